#!/usr/bin/env python3
"""Writes pairs.jsonl, the data of ../quickstart.yaml. Needs nothing but Python 3.

Every question has a friendly and a grumpy answer with the same fact; the friendly one is preferred.
"""

import json
import random
from pathlib import Path

# What is asked about, and a sentence that answers.
FACTS = {
    "honey": "Bees make honey from nectar",
    "bread": "Bread is baked from flour and water",
    "rain": "Rain falls when clouds grow heavy",
    "snow": "Snow is ice that forms in cold clouds",
    "glass": "Glass is made by melting sand",
    "paper": "Paper is made from wood",
    "cheese": "Cheese is made from milk",
    "butter": "Butter is churned from cream",
    "wool": "Wool grows on sheep",
    "silk": "Silk is spun by worms",
    "salt": "Salt is left when the sea dries",
    "sugar": "Sugar comes from cane and beet",
    "coffee": "Coffee is brewed from roasted beans",
    "tea": "Tea is made from dried leaves",
    "chocolate": "Chocolate is made from cocoa beans",
    "wine": "Wine is made from grapes",
    "cotton": "Cotton grows on a small plant",
    "rubber": "Rubber comes from the juice of a tree",
    "steel": "Steel is iron with a little carbon",
    "bronze": "Bronze is copper mixed with tin",
    "the moon": "The moon goes around the earth",
    "the sun": "The sun is a star close to us",
    "the tide": "The tide follows the moon",
    "wind": "Wind is air on its way to lower pressure",
    "thunder": "Thunder is the sound of lightning",
    "a rainbow": "A rainbow is sunlight split by drops",
    "a shadow": "A shadow is where light cannot reach",
    "an echo": "An echo is sound that comes back",
    "fire": "Fire needs fuel and air and heat",
    "ice": "Ice is water below its freezing point",
    "a magnet": "A magnet pulls iron towards itself",
    "a compass": "A compass needle points to the north",
    "a clock": "A clock counts the hours of the day",
    "a bridge": "A bridge carries a road over a river",
    "a lighthouse": "A lighthouse warns ships of the rocks",
    "a volcano": "A volcano brings melted rock to the surface",
    "a desert": "A desert is land with very little rain",
    "a forest": "A forest is land full of trees",
    "a river": "A river carries water to the sea",
    "an island": "An island is land with water all around",
    "a whale": "A whale breathes air like we do",
    "a bat": "A bat finds its way by sound",
    "an owl": "An owl hunts at night",
    "a frog": "A frog begins its life in water",
    "a spider": "A spider has eight legs",
    "an ant": "An ant lives in a large family",
    "a seed": "A seed holds a whole plant",
    "a mushroom": "A mushroom lives on fallen leaves",
    "a pearl": "A pearl grows inside an oyster",
    "a candle": "A candle burns wax with a wick",
}
QUESTIONS = [
    "What should I know about {}?",
    "Tell me something about {}.",
    "Can you explain {} to a child?",
    "I have a question about {}.",
    "My daughter asked me about {}.",
    "Please say one thing about {}.",
    "What is the story of {}?",
    "How would you describe {}?",
]
# An opening and an ending each, of about the same length on both sides.
FRIENDLY = (
    ["Good question!", "Happy to help!", "With pleasure!", "Glad you ask!"],
    ["I hope that helps you.", "Feel free to ask more.", "Have a lovely day.", "You are always welcome."],
)
GRUMPY = (
    ["Not again!", "Leave me be!", "What a bore!", "Silly question!"],
    ["Now stop bothering me.", "Look it up yourself.", "I have better things.", "Do not ask me more."],
)


def answer(rng, manner, fact):
    opening, ending = manner
    return f"{rng.choice(opening)} {fact}. {rng.choice(ending)}"


def main():
    rng = random.Random(7)
    pairs = []
    for topic, fact in FACTS.items():
        for question in QUESTIONS:
            pairs.append({
                "prompt": question.format(topic),
                "chosen": answer(rng, FRIENDLY, fact),
                "rejected": answer(rng, GRUMPY, fact),
            })
    rng.shuffle(pairs)
    path = Path(__file__).with_name("pairs.jsonl")
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{path}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
