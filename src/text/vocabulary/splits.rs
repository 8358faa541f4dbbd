//! llama.cpp's names for the ways of byte-level BPE to split texts into words (`llama-vocab.cpp`), and the patterns of the original
//! `tokenizer.json` files that they stand for.

use anyhow::{Result, anyhow};
use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

use crate::text::split::LLAMA3;

/// A way to split texts.
#[derive(Debug)]
pub(super) struct Splits {
    /// llama.cpp's names.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether a word that is a token is taken as such, whatever the merges make of it.
    pub(super) ignore_merges: bool,
    /// Whether BOS comes before a text, unless the file says otherwise.
    pub(super) add_bos: bool,
    /// Whether the original normalises Unicode to NFC.
    pub(super) nfc: bool,
}

/// A step in splitting a text; each splits what the ones before have left.
#[derive(Debug)]
enum Step {
    /// Each digit is a word.
    Digits,
    /// GPT-2's pattern, as the last step: the library has it built in.
    Gpt2,
    /// GPT-2's pattern before others.
    Gpt2Pattern,
    /// What the pattern finds is a word, and so is what lies between.
    Pattern(&'static str),
}

/// A step before BPE, as a file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Words are what the pattern matches and what is between.
    Pattern(String),
    /// Every digit is a word.
    Digits,
    /// GPT-2's pattern.
    Gpt2,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The spellings of GPT-2's pattern in files.
const GPT2S: [&str; 2] = [
    GPT2,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
];
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words between punctuation, as BLOOM cuts them.
const BLOOM: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+";
/// The letters that `DeepSeek` counts to words, by their code points.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]+";
const DEEPSEEK_HAN: &str = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const fn ways(names: &'static [&'static str], steps: &'static [Step]) -> Splits {
    Splits {
        names,
        steps,
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    }
}

/// All ways.
static WAYS: &[Splits] = &[
    Splits {
        ignore_merges: true,
        add_bos: true,
        ..ways(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
            ],
            &[Step::Pattern(LLAMA3)],
        )
    },
    Splits {
        ignore_merges: true,
        ..ways(&["glm4"], &[Step::Pattern(LLAMA3)])
    },
    ways(
        &["dbrx", "smaug-bpe", "chatglm-bpe"],
        &[Step::Pattern(LLAMA3)],
    ),
    Splits {
        nfc: true,
        ..ways(&["qwen2"], &[Step::Pattern(QWEN2)])
    },
    ways(&["qwen35"], &[Step::Pattern(QWEN35)]),
    ways(
        &[
            "deepseek-r1-qwen",
            "kormo",
            "megrez",
            "stablelm2",
            "hunyuan",
            "grok-2",
            "solar-open",
        ],
        &[Step::Pattern(QWEN2)],
    ),
    ways(
        &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
            "jais",
            "trillion",
            "granite-docling",
        ],
        &[Step::Gpt2],
    ),
    Splits {
        nfc: true,
        ..ways(&["olmo", "mpt"], &[Step::Gpt2])
    },
    ways(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[Step::Digits, Step::Gpt2],
    ),
    ways(
        &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        &[Step::Pattern(GPT4O)],
    ),
    Splits {
        ignore_merges: true,
        add_bos: true,
        ..ways(&["tekken"], &[Step::Pattern(TEKKEN)])
    },
    ways(
        &["deepseek-llm"],
        &[
            Step::Pattern("[\r\n]"),
            Step::Pattern(DEEPSEEK_LETTERS),
            Step::Pattern(
                r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
            ),
            Step::Pattern(r"\s+$"),
            Step::Pattern(DEEPSEEK_HAN),
            Step::Pattern(r"\p{N}+"),
        ],
    ),
    ways(
        &["deepseek-coder"],
        &[
            Step::Pattern("[\r\n]"),
            Step::Pattern(r"\s?\p{L}+"),
            Step::Pattern(r"\s?\p{P}+"),
            Step::Pattern(DEEPSEEK_HAN),
            Step::Pattern(r"\p{N}"),
        ],
    ),
    ways(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[
            Step::Pattern(r"\p{N}{1,3}"),
            Step::Pattern(r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"),
            Step::Pattern(DEEPSEEK3),
        ],
    ),
    ways(
        &["falcon"],
        &[
            Step::Pattern(r"[\p{P}\$\+<=>\^~\|`]+"),
            Step::Gpt2Pattern,
            Step::Pattern("[0-9][0-9][0-9]"),
        ],
    ),
    // What llama.cpp does with a file that doesn't say how.
    ways(
        &["default"],
        &[
            Step::Pattern(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Gpt2Pattern,
            Step::Pattern(r"\p{N}+"),
            Step::Pattern("[0-9][0-9][0-9]"),
        ],
    ),
    ways(&["seed-coder"], &[Step::Pattern(SEED)]),
    Splits {
        ignore_merges: true,
        ..ways(
            &["minicpm5"],
            &[Step::Pattern(r"\p{N}{1,3}"), Step::Pattern(MINICPM)],
        )
    },
    ways(
        &["superbpe"],
        &[
            Step::Pattern(r"\p{N}+"),
            Step::Pattern(r"(?=(\d{3})+(?!\d))"),
        ],
    ),
    ways(
        &["bloom", "poro-chat", "gpt3-finnish"],
        &[Step::Pattern(BLOOM)],
    ),
    ways(
        &["viking"],
        &[Step::Pattern(BLOOM), Step::Pattern(r"\p{N}")],
    ),
];

/// The names of all ways.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    WAYS.iter().flat_map(|way| way.names).copied()
}

impl Splits {
    /// The way that llama.cpp calls `name`.
    pub(super) fn by_name(name: &str) -> Option<&'static Self> {
        WAYS.iter().find(|way| way.names.contains(&name))
    }

    /// llama.cpp's first name of it.
    pub(super) fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or("default")
    }

    /// The way that has the steps of a file. Of several, one that agrees in the other settings comes first: texts of tokens that merges don't
    /// make are rare, and so are texts that NFC changes.
    pub(super) fn by_steps(
        found: &[Found],
        ignore_merges: bool,
        nfc: bool,
    ) -> Option<&'static Self> {
        let same = |step: &Step, found: &Found| match (step, found) {
            (Step::Digits, Found::Digits) | (Step::Gpt2, Found::Gpt2) => true,
            (Step::Gpt2 | Step::Gpt2Pattern, Found::Pattern(text)) => {
                GPT2S.contains(&text.as_str())
            }
            (Step::Pattern(known), Found::Pattern(text)) => known == text,
            _ => false,
        };
        let ways = WAYS.iter().filter(|way| {
            way.steps.len() == found.len() && way.steps.iter().zip(found).all(|(a, b)| same(a, b))
        });
        ways.min_by_key(|way| (way.ignore_merges != ignore_merges, way.nfc != nfc))
    }

    /// The pre-tokenizer: the steps, then the characters of byte-level BPE for all bytes.
    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let bytes = |regex| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, regex));
        let pattern = |text: &str| {
            let pattern = SplitPattern::Regex(text.to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::Split)
                .map_err(|error| anyhow!("a pattern can't be used: {error}"))
        };
        let mut steps = Vec::new();
        let mut built_in = false;
        for step in self.steps {
            match step {
                Step::Digits => steps.push(PreTokenizerWrapper::Digits(Digits::new(true))),
                Step::Pattern(text) => steps.push(pattern(text)?),
                Step::Gpt2 => built_in = true,
                Step::Gpt2Pattern => steps.push(pattern(GPT2)?),
            }
        }
        steps.push(bytes(built_in));
        Ok(match steps.len() {
            1 => bytes(built_in),
            _ => PreTokenizerWrapper::Sequence(Sequence::new(steps)),
        })
    }
}
