package ethtool

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// text renders features as `ethtool -k` does, one for each line.
func text(f *Features) string {
	var b strings.Builder
	b.WriteString(f.Device().String() + "\n")
	for name, s := range f.All() {
		b.WriteString(string(name) + ": " + s.String() + "\n")
	}
	return b.String()
}

// captured reads a payload that TestBothFormsSayTheSame captured from a kernel. They are of a
// little-endian machine.
func captured(t testing.TB, name string) []byte {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("needs a little-endian machine, as the captured messages are")
	}
	b, err := os.ReadFile(filepath.Join("testdata", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func capturedNames(t testing.TB) *nameTable {
	t.Helper()
	names, err := decodeNames(captured(t, "strset"), stringSetFeatures)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestDecodeCaptured(t *testing.T) {
	names := capturedNames(t)
	compact, never, err := decodeFeatures(captured(t, "get-compact"), names)
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "get.txt")
	got := text(compact)
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !never.get(names.index["vlan-challenged"]) || never.get(names.index[TCPSegmentation]) {
		t.Errorf("never changeable: %x, want vlan-challenged in it and not %s", never, TCPSegmentation)
	}

	// The verbose form brings its names; a table that fits is kept, so that names are shared.
	for _, known := range []*nameTable{nil, names} {
		verbose, _, err := decodeFeatures(captured(t, "get-verbose"), known)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(got, text(verbose)); diff != "" {
			t.Errorf("(-compact +verbose):\n%s", diff)
		}
		if !verbose.Equal(compact) || known != nil && verbose.names != known {
			t.Errorf("the two forms are not equal, or the table is not shared")
		}
	}
	if _, _, err := decodeFeatures(captured(t, "get-compact"), nil); !errors.Is(err, errAlien) {
		t.Errorf("compact form without names: got %v, want an error", err)
	}
	ntf, _, err := decodeFeatures(captured(t, "ntf"), names)
	if err != nil {
		t.Fatal(err)
	}
	checkGroList := func(f *Features, want bool) {
		if s, ok := f.Get("rx-gro-list"); !ok || s.Active != want {
			t.Errorf("rx-gro-list is %v, want %v", s, want)
		}
	}
	checkGroList(compact, false)
	checkGroList(ntf, true)
}

// Every prefix of a message is an error or a shorter message, never a panic.
func TestDecodeTruncated(t *testing.T) {
	names := capturedNames(t)
	for _, name := range []string{"get-verbose", "get-compact", "ntf", "set-verbose", "set-compact", "set-noop", "strset"} {
		b := captured(t, name)
		for n := range b {
			f, _, err := decodeFeatures(b[:n], names)
			if err == nil {
				t.Errorf("%s: %d of %d bytes decode as %s", name, n, len(b), text(f))
			} else if !errors.Is(err, errAlien) {
				t.Errorf("%s: %d of %d bytes: %v, want errAlien", name, n, len(b), err)
			}
			_, _ = decodeSetReply(b[:n], names)
			_, _ = decodeNames(b[:n], stringSetFeatures)
		}
	}
}

func TestFeaturesValue(t *testing.T) {
	state := map[Feature]State{
		TCPSegmentation: {Active: true, Wanted: true, Changeable: true},
		ESPHWOffload:    {},
		GenericSegm:     {Wanted: true, Changeable: true},
	}
	f := NewFeatures(7, "eth0", state)
	if f.Len() != 3 || f.Device() != (Device{Index: 7, Name: "eth0"}) {
		t.Errorf("got %d features of %v", f.Len(), f.Device())
	}
	got := map[Feature]State{}
	for name, s := range f.All() {
		got[name] = s
	}
	if diff := cmp.Diff(state, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for name, want := range state {
		if s, ok := f.Get(name); !ok || s != want {
			t.Errorf("%s: got %v, %v", name, s, ok)
		}
	}
	if _, ok := f.Get("nosuch"); ok {
		t.Error("an unknown feature is known")
	}
	if !f.Equal(NewFeatures(7, "eth0", state)) || f.Equal(NewFeatures(8, "eth0", state)) || f.Equal(nil) {
		t.Error("Equal is wrong")
	}
	other := map[Feature]State{TCPSegmentation: {}, ESPHWOffload: {}, UDPSegmentation: {}}
	if f.Equal(NewFeatures(7, "eth0", other)) {
		t.Error("different features are equal")
	}
	for _, f := range []*Features{nil, {}} {
		if _, ok := f.Get(TCPSegmentation); ok || f.Len() != 0 {
			t.Error("the zero value knows a feature")
		}
		for range f.All() {
			t.Error("the zero value has a feature")
		}
	}
}

func FuzzDecode(f *testing.F) {
	names := capturedNames(f)
	for _, name := range []string{"get-verbose", "get-compact", "ntf", "set-verbose", "set-compact", "set-noop", "strset"} {
		f.Add(captured(f, name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, names := range []*nameTable{nil, names} {
			if got, never, err := decodeFeatures(b, names); err == nil {
				_ = text(got)
				_ = never.get(1 << 20)
				if same := got; !got.Equal(same) || got.Index <= 0 || got.Name == "" {
					t.Errorf("decoded as %+v", got)
				}
			} else if !errors.Is(err, errAlien) {
				t.Errorf("got %v, want errAlien", err)
			}
			_, _ = decodeSetReply(b, names)
		}
		if names, err := decodeNames(b, stringSetFeatures); err == nil && len(names.index) == 0 {
			t.Error("no names and no error")
		}
	})
}
