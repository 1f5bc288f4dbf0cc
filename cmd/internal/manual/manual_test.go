package manual

import "testing"

func TestTextIsNothingButText(t *testing.T) {
	for in, want := range map[string]string{
		`.x \ - a…`: `\&.x \e \- a...`, "'x": `\&'x`, "a → b": `a \(-> b`, "plain": "plain",
	} {
		if got := Text(in); got != want {
			t.Errorf("%q is escaped as %q, want %q", in, got, want)
		}
	}
}
