// Renders conversations with a template of Go's, as Ollama does for a TEMPLATE that goes through `.Messages`: system messages are also joined in
// `.System`, and messages of one role that follow each other become one. See check_modelfile.py.
//
// Standard input: a line of JSON each, {"template": "..", "messages": [{"role": "..", "content": ".."}]}. Standard output: a JSON string
// each.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

// Message is a turn; templates read its fields.
type Message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type task struct {
	Template string    `json:"template"`
	Messages []Message `json:"messages"`
}

func render(one task) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
	if err != nil {
		return "", err
	}
	var system []string
	var turns []*Message
	for _, message := range one.Messages {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
		if last := len(turns) - 1; last >= 0 && turns[last].Role == message.Role {
			turns[last].Content += "\n\n" + message.Content
		} else {
			turns = append(turns, &Message{message.Role, message.Content})
		}
	}
	var out strings.Builder
	err = parsed.Execute(&out, map[string]any{
		"System":   strings.Join(system, "\n\n"),
		"Messages": turns,
		"Response": "",
	})
	return out.String(), err
}

func main() {
	in, out := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for in.More() {
		var one task
		if err := in.Decode(&one); err != nil {
			panic(err)
		}
		text, err := render(one)
		if err != nil {
			panic(err)
		}
		if err := out.Encode(text); err != nil {
			panic(err)
		}
	}
}
