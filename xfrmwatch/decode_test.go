package xfrmwatch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var cmpOpts = cmp.Options{
	cmp.Comparer(func(a, b Selector) bool { return a == b }),
	cmp.Comparer(func(a, b Template) bool { return a == b }),
	cmp.Comparer(func(a, b SAKey) bool { return a == b }),
	cmp.Comparer(func(a, b SA) bool { return a == b }),
}

func decoded(t interface {
	Helper()
	Fatalf(string, ...any)
}, typ uint16, b []byte) Event {
	t.Helper()
	ev, resync, err := Decode(typ, b)
	if err != nil || resync {
		t.Fatalf("type %#x: resync %v, error %v", typ, resync, err)
	}
	return ev
}

func TestPolicyMessagesRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := genPolicy().Draw(t, "policy")
		for _, typ := range []uint16{msgNewPolicy, msgUpdPolicy} {
			if diff := cmp.Diff(Event(PolicySet{Policy: p}), decoded(t, typ, wirePolicy(p)), cmpOpts); diff != "" {
				t.Errorf("policy (-want +got):\n%s", diff)
			}
		}
		gone := Event(PolicyGone{p.Index})
		for _, byIndex := range []bool{true, false} {
			if got := decoded(t, msgDelPolicy, wireDelPolicy(p, byIndex)); got != gone {
				t.Errorf("delpolicy: got %v, want %v", got, gone)
			}
		}
		if got := decoded(t, msgPolExpire, wirePolExpire(p, true)); got != gone {
			t.Errorf("hard polexpire: got %v, want %v", got, gone)
		}
		if got := decoded(t, msgPolExpire, wirePolExpire(p, false)); got != nil {
			t.Errorf("soft polexpire: got %v, want nothing", got)
		}
	})
}

func TestSAMessagesRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSA().Draw(t, "sa")
		for _, typ := range []uint16{msgNewSA, msgUpdSA} {
			want := Event(SASet{SA: s, Update: typ == msgUpdSA})
			if diff := cmp.Diff(want, decoded(t, typ, wireSA(s, saKeys{})), cmpOpts); diff != "" {
				t.Errorf("sa (-want +got):\n%s", diff)
			}
		}
		if got := decoded(t, msgDelSA, wireDelSA(s)); got != Event(SAGone{s.Key}) {
			t.Errorf("delsa: got %v, want %v", got, s.Key)
		}
		if got := decoded(t, msgExpire, wireExpire(s, true)); got != Event(SAGone{s.Key}) {
			t.Errorf("hard expire: got %v, want %v", got, s.Key)
		}
		if got := decoded(t, msgExpire, wireExpire(s, false)); got != Event(SADying{s.Key}) {
			t.Errorf("soft expire: got %v, want %v", got, s.Key)
		}
	})
}

func TestUnspecifiedPrefixKeepsItsFamily(t *testing.T) {
	p := &Policy{Index: 9, Dir: Out, Selector: anySelector(IPv6)}
	got := decoded(t, msgNewPolicy, wirePolicy(p)).(PolicySet).Policy
	if s := got.Selector.Dst.String(); s != "::/0" {
		t.Errorf("got %s, want ::/0", s)
	}
}

func TestOtherMessages(t *testing.T) {
	for _, typ := range []uint16{msgFlushSA, msgFlushPolicy, msgMigrate, msgMapping} {
		if ev, resync, err := Decode(typ, nil); ev != nil || !resync || err != nil {
			t.Errorf("type %#x: %v, %v, %v, want a resync", typ, ev, resync, err)
		}
	}
	for _, typ := range []uint16{msgNewAE, msgAcquire, msgReport} {
		if ev, resync, err := Decode(typ, []byte{1}); ev != nil || resync || err != nil {
			t.Errorf("type %#x: %v, %v, %v, want nothing", typ, ev, resync, err)
		}
	}
	if _, _, err := Decode(0x99, nil); !errors.Is(err, errAlien) {
		t.Errorf("got %v, want %v", err, errAlien)
	}
	want := Event(DefaultSet{Default{In: Block, Forward: Allow, Out: Allow}})
	if got := decoded(t, msgGetDefault, []byte{1, 2, 0}); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
	// A delete that names no policy means that all must be read again.
	if _, resync, err := Decode(msgDelPolicy, make([]byte, sizePolicyID)); !resync || err != nil {
		t.Errorf("delpolicy without index: %v, %v", resync, err)
	}
}

func TestAttributeFlagsAreMasked(t *testing.T) {
	b := wirePolicyInfo(&Policy{Index: 1, Selector: anySelector(IPv4)})
	b = append(b, wireU32(attrIfID|0x8000, 5)...)
	b = append(b, wireAttr(0x3ff0, []byte("unknown"))...)
	if got := decoded(t, msgNewPolicy, b).(PolicySet).Policy.IfID; got != 5 {
		t.Errorf("if_id %d, want 5", got)
	}
}

// Each cut of a good message is an error or, at the end of an attribute, a shorter one.
func TestCutMessages(t *testing.T) {
	for name, seed := range seeds() {
		for n := range seed.data {
			if _, _, err := Decode(seed.typ, seed.data[:n]); err != nil && !errors.Is(err, errShort) {
				t.Errorf("%s cut at %d: %v", name, n, err)
			}
		}
	}
}

func TestKeyBytesNeverAppear(t *testing.T) {
	key := []byte("SECRETKEYMATERIAL-0123456789abcd")
	s := &SA{Src: addr("192.0.2.1"), Dst: addr("192.0.2.2"), SPI: 0x1234, Proto: ESP, Family: IPv4, Mode: Tunnel,
		Enc: Algorithm{Name: "cbc(aes)"}, Auth: Algorithm{"hmac(sha256)", 128}, AEAD: Algorithm{"rfc4106(gcm(aes))", 128}}
	msg := wireSA(s.keyed(), saKeys{key, key, key})
	if bytes.Count(msg, key) != 4 {
		t.Fatal("the message should hold the key in four attributes")
	}
	ev := decoded(t, msgNewSA, msg).(SASet)
	js, err := json.Marshal(ev)
	if err != nil {
		t.Fatal(err)
	}
	cut := append([]byte(nil), msg[:len(msg)-3]...)
	_, _, decodeErr := Decode(msgNewSA, cut)
	for _, text := range []string{fmt.Sprintf("%+v %#v", *ev.SA, *ev.SA), string(js), fmt.Sprint(decodeErr)} {
		for _, part := range []string{string(key[:6]), fmt.Sprintf("%x", key[:6]), fmt.Sprintf("%d", key[:6])[1:12]} {
			if strings.Contains(text, part) {
				t.Errorf("the key is in %s", text)
			}
		}
	}
	// A name without a terminator ends where its field ends, before the key.
	full := strings.Repeat("n", 64)
	s.AEAD.Name = full
	ev = decoded(t, msgNewSA, wireSA(s, saKeys{aead: key})).(SASet)
	if ev.SA.AEAD.Name != full {
		t.Errorf("name %q, want %q", ev.SA.AEAD.Name, full)
	}
	// What was decoded does not change with the buffer.
	want := *ev.SA
	for i := range msg {
		msg[i] = 0xff
	}
	if *ev.SA != want {
		t.Error("the SA shares memory with the message")
	}
}

type seed struct {
	typ  uint16
	data []byte
}

// seeds are one message of each kind, made here.
func seeds() map[string]seed {
	p := &Policy{Index: 9, Dir: Out, Priority: 7, Selector: selector("10.0.0.0/8", "10.2.0.0/16"), IfID: 3,
		Mark: Mark{1, 1}, Sub: true, OffloadDev: 2, OffloadFlag: 4, Templates: []Template{{
			Dst: addr("192.0.2.2"), Src: addr("192.0.2.1"), Family: IPv4, Proto: ESP, Mode: Tunnel, Reqid: 5}}}
	s := (&SA{Src: addr("2001:db8::1"), Dst: addr("2001:db8::2"), SPI: 77, Proto: ESP, Family: IPv6, Mode: Tunnel,
		HasSelector: true, Selector: anySelector(IPv4), Reqid: 5, AEAD: Algorithm{"rfc4106(gcm(aes))", 128},
		Enc: Algorithm{Name: "cbc(aes)"}, Auth: Algorithm{"hmac(sha1)", 96}, Comp: Algorithm{Name: "deflate"},
		Encap: Encap{2, 4500, 4500}, Mark: Mark{1, 1}, OutputMark: Mark{2, 2}, IfID: 3, ExtraFlags: 1, SADir: 2,
		OffloadDev: 2, OffloadFlags: 1}).keyed()
	return map[string]seed{
		"newpolicy": {msgNewPolicy, wirePolicy(p)},
		"delpolicy": {msgDelPolicy, wireDelPolicy(p, true)},
		"polexpire": {msgPolExpire, wirePolExpire(p, true)},
		"newsa":     {msgNewSA, wireSA(s, saKeys{enc: make([]byte, 16)})},
		"delsa":     {msgDelSA, wireDelSA(s)},
		"expire":    {msgExpire, wireExpire(s, true)},
		"default":   {msgGetDefault, []byte{1, 2, 2, 0}},
	}
}

// FuzzDecode looks for panics, and for events that are not fit for a DB. Its corpus has messages
// of this file's own making and those that a kernel sent (testdata/captured, one file for each,
// the type in its name).
func FuzzDecode(f *testing.F) {
	for _, s := range seeds() {
		f.Add(s.typ, s.data)
	}
	files, err := filepath.Glob("testdata/captured/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		typ, data := captured(f, file)
		f.Add(typ, data)
	}
	f.Fuzz(func(t *testing.T, typ uint16, data []byte) {
		ev, resync, err := Decode(typ, data)
		if err != nil && (ev != nil || resync) {
			t.Errorf("an error with %v, %v", ev, resync)
		}
		switch ev := ev.(type) {
		case PolicySet:
			if s := ev.Policy.Selector; !s.Src.IsValid() || !s.Dst.IsValid() {
				t.Errorf("selector %+v", s)
			}
			for _, tmpl := range ev.Policy.Templates {
				if !tmpl.Dst.IsValid() || !tmpl.Src.IsValid() {
					t.Errorf("template %+v", tmpl)
				}
			}
		case SASet:
			if !ev.SA.Dst.IsValid() || ev.SA.Key.Dst != ev.SA.Dst {
				t.Errorf("sa %+v", ev.SA)
			}
			ev.SA.InnerMTU(1500)
		}
		var db DB
		for _, e := range []Event{ResyncBegin{}, ev, ResyncEnd{}, ev} {
			if e != nil {
				db.Apply(e)
			}
		}
		for c := range db.Coverages() {
			c.MTU(func(*SA) (int, bool) { return 1500, true }, 1500)
		}
	})
}

// FuzzKeys: the bytes of a key make no difference to what is decoded of an SA, wherever they stand.
func FuzzKeys(f *testing.F) {
	f.Add(seeds()["newsa"].data[sizeSAInfo:], []byte("0123456789abcdef"))
	f.Add([]byte{}, make([]byte, 36))
	f.Fuzz(func(t *testing.T, attributes, key []byte) {
		s := (&SA{Src: addr("2001:db8::1"), Dst: addr("2001:db8::2"), SPI: 77, Proto: ESP, Family: IPv6, Mode: Tunnel, Reqid: 5,
			AEAD: Algorithm{"rfc4106(gcm(aes))", 128}, Enc: Algorithm{Name: "cbc(aes)"}, Auth: Algorithm{"hmac(sha1)", 96}}).keyed()
		other := bytes.Clone(key)
		for i := range other {
			other[i] ^= 0x5a
		}
		var decoded [2]Event
		var failed [2]bool
		for i, k := range [][]byte{key, other} {
			k = k[:min(len(k), 1<<10)]
			ev, _, err := Decode(msgNewSA, append(wireSA(s, saKeys{enc: k, auth: k, aead: k}), attributes...))
			decoded[i], failed[i] = ev, err != nil
		}
		if failed[0] != failed[1] || !reflect.DeepEqual(decoded[0], decoded[1]) {
			t.Errorf("the bytes of a key make a difference: %+v and %+v", decoded[0], decoded[1])
		}
		if set, ok := decoded[0].(SASet); ok && len(key) >= 8 && strings.Contains(fmt.Sprintf("%+v", *set.SA), string(key)) && !bytes.Contains(attributes, key) {
			t.Errorf("the key stands in %+v", *set.SA)
		}
	})
}

// FuzzMessages looks for panics in the framing of a datagram.
func FuzzMessages(f *testing.F) {
	f.Add([]byte{20, 0, 0, 0, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		if err := messages(b, func(m message) bool {
			total += 16 + len(m.data)
			_ = m.errno()
			return true
		}); err == nil && total > len(b) {
			t.Errorf("%d bytes of messages in %d", total, len(b))
		}
	})
}

func captured(t testing.TB, file string) (typ uint16, data []byte) {
	t.Helper()
	if _, err := fmt.Sscanf(filepath.Base(file), "%x-", &typ); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return typ, data
}
