package probe

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// FuzzLoad reads a file that anything may stand in: a result that is taken is, saved again, the same one.
func FuzzLoad(f *testing.F) {
	for _, s := range []string{"", "{}", "null", `{"version":1,"cases":[{"kind":"gre","outer":"ipv4","mode":"tunnel"}]}`, `{"version":1e3}`, `{"version":1,"time":"2026-01-02T03:04:05.5+01:00","cases":null}`} {
		f.Add([]byte(s))
	}
	r := Result{Version: Version, Time: time.Unix(1e9, 0), Cases: []Case{{Kind: "vxlan", Outer: IPv4, Mode: Tunnel}}}
	file := filepath.Join(f.TempDir(), "probe.json")
	if err := r.Save(file); err != nil {
		f.Fatal(err)
	}
	saved, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(saved)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeResult(b)
		if err != nil {
			if r != nil {
				t.Errorf("%+v and %v", r, err)
			}
			return
		}
		file := filepath.Join(t.TempDir(), "probe.json")
		if err := r.Save(file); err != nil {
			t.Fatal(err)
		}
		again, err := Load(file)
		if err != nil || !sameResult(r, again) {
			t.Errorf("%+v is loaded as %+v, %v", r, again, err)
		}
		_ = r.Valid(Identity{})
		_ = r.Measured()
	})
}

// sameResult compares two results, but for what no text tells apart: a list that is nil or empty.
func sameResult(a, b *Result) bool {
	x, y := *a, *b
	if !x.Time.Equal(y.Time) || len(x.Loaded) != len(y.Loaded) || len(x.Cases) != len(y.Cases) {
		return false
	}
	x.Time, y.Time, x.Loaded, y.Loaded, x.Cases, y.Cases = time.Time{}, time.Time{}, nil, nil, nil, nil
	return reflect.DeepEqual(x, y)
}
