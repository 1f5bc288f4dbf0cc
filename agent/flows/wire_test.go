package flows

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"tsoagent/sockopt"
)

// drawFlow draws a flow with whatever can be in one, and often what is simple.
func drawFlow(t *rapid.T) Flow {
	text := rapid.StringMatching(`[a-z0-9:.\[\] -]{1,12}`)
	plain := rapid.Bool().Draw(t, "plain")
	if !plain {
		text = rapid.OneOf(text, rapid.String(), rapid.SampledFrom([]string{"", `"`, `\`, "<&>", "\x7f", "é", "\xff", "\u2028", "a\nb"}))
	}
	f := Flow{
		State: text.Draw(t, "state"), Local: text.Draw(t, "local"), Remote: text.Draw(t, "remote"), Coverage: text.Draw(t, "coverage"),
		Policy: rapid.Uint32().Draw(t, "policy"), Segmentation: sockopt.Segmentation(text.Draw(t, "segmentation")), Device: text.Draw(t, "device"),
		Lost: rapid.Bool().Draw(t, "lost"), Contradiction: text.Draw(t, "contradiction"), Why: text.Draw(t, "why"), Listener: text.Draw(t, "listener"),
		UID: rapid.Uint32().Draw(t, "uid"), Inode: rapid.Uint64().Draw(t, "inode"),
	}
	for range rapid.IntRange(0, 2).Draw(t, "processes") {
		if plain {
			break
		}
		f.Processes = append(f.Processes, Process{rapid.Int().Draw(t, "pid"), text.Draw(t, "name")})
	}
	return f
}

// TestWireIsJSON holds both to encoding/json.
func TestWireIsJSON(t *testing.T) {
	read := 0
	rapid.Check(t, func(t *rapid.T) {
		f, into := drawFlow(t), drawFlow(t)
		want, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		got, err := AppendJSON(nil, &f)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Fatalf("written (-json +ours):\n%s", d)
		}
		var plain Flow
		if err := json.Unmarshal(want, &plain); err != nil {
			t.Fatal(err)
		}
		if !ParseJSON(got, &into) {
			return
		}
		read++
		if d := cmp.Diff(plain, into); d != "" {
			t.Fatalf("read (-json +ours):\n%s\nof %s", d, got)
		}
	})
	if read == 0 {
		t.Error("no flow was simple enough to be read")
	}
}

// What the fixed scenes say is simple: the fast way is taken where it matters.
func TestWireReadsWhatIsCommon(t *testing.T) {
	for _, s := range scenes {
		j := NewJoin(world(), Filter{States: StateNames{allStates}})
		var into Flow
		for i := range s.conns {
			f := j.Add(&s.conns[i])
			b, err := AppendJSON(nil, f)
			if err != nil {
				t.Fatal(err)
			}
			if !ParseJSON(b, &into) || !cmp.Equal(*f, into) {
				t.Errorf("%s came over as %+v", b, into)
			}
		}
	}
}

// FuzzParseJSON finds no line that is read otherwise than encoding/json reads it.
func FuzzParseJSON(f *testing.F) {
	for _, s := range []string{
		`{"state":"a","local":"b","coverage":"none","segmentation":"offload","uid":0}`, `{"state":"a","uid":01}`, `{"state":"a",}`, `{"state":"a","lost":false}`,
		`{"result":{"version":1}}`, `{"error":"x"}`, `{}`, `{"state":"a"`, `{"state":"a" ,"uid":1}`, `{"state":"a","state":"b"}`, `{"state":1}`, `{"state":"a","uid":"1"}`, `{"state":"a","uid":+1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var ours, plain Flow
		if !ParseJSON(line, &ours) {
			return
		}
		if err := json.Unmarshal(line, &plain); err != nil {
			t.Fatalf("%q was read, and is no JSON: %v", line, err)
		}
		if d := cmp.Diff(plain, ours); d != "" {
			t.Errorf("%q (-json +ours):\n%s", line, d)
		}
	})
}

func BenchmarkWire(b *testing.B) {
	f := Flow{
		State: "established", Local: "10.1.0.1:179", Remote: "10.1.0.3:40001", Coverage: NotCovered, Segmentation: sockopt.SegNone, Device: "eth0", Lost: true,
		Why: "no key, but inherited from listener 0.0.0.0:179, which holds 2 TCP-MD5 keys", Listener: "0.0.0.0:179", UID: 101, Inode: 903,
	}
	line, err := AppendJSON(nil, &f)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			line, _ = AppendJSON(line[:0], &f)
		}
	})
	b.Run("read", func(b *testing.B) {
		var into Flow
		for b.Loop() {
			if !ParseJSON(line, &into) {
				b.Fatal("not read")
			}
		}
	})
}
