// Renders templates as Ollama does (template/template.go: Parse, collate, Execute): JSON cases in, JSON texts out.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type job struct {
	Template string    `json:"template"`
	Messages []message `json:"messages"`
}

func collate(given []message) (string, []*message) {
	var system []string
	var collated []*message
	for i := range given {
		m := given[i]
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(collated); n > 0 && collated[n-1].Role == m.Role && m.Role != "tool" {
			collated[n-1].Content += "\n\n" + m.Content
		} else {
			collated = append(collated, &m)
		}
	}
	return strings.Join(system, "\n\n"), collated
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, one := range jobs {
		parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
		if err != nil {
			panic(err)
		}
		system, messages := collate(one.Messages)
		var text bytes.Buffer
		values := map[string]any{"System": system, "Messages": messages, "Tools": nil, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
