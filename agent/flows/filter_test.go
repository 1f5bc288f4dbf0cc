package flows

import (
	"net/url"
	"strings"
	"testing"
)

func parse(t *testing.T, query string) Filter {
	t.Helper()
	v, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	f, err := FilterFrom(v)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestFilterSaysWhatIsWrong(t *testing.T) {
	for query, want := range map[string]string{
		"state=open":               `"open" is no TCP state: close-wait, closed, closing, established, fin-wait-1, fin-wait-2, last-ack, listening, syn-recv, syn-sent, time-wait, or all`,
		"state=established,":       `"" is no TCP state`,
		"listener=bgp":             `"bgp" is no listener: give PORT`,
		"listener=0":               `"0" is no listener`,
		"listener=65536":           `"65536" is no listener`,
		"listener=10.0.0.1":        `"10.0.0.1" is no listener`,
		"listener=10.0.0.1:0":      `"10.0.0.1:0" is no listener`,
		"listener=fd01::1:179":     `"fd01::1:179" is no listener`,
		"listener=[fe80::1%25a]:9": `is no listener`,
		"lost=maybe":               `"maybe" is neither true nor false`,
		"lost=maybe&state=open":    "lost: \"maybe\" is neither true nor false\nstate:",
	} {
		v, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := FilterFrom(v); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", query, err, want)
		}
	}
}

func TestListenerAsItIsShown(t *testing.T) {
	for s, want := range map[string]string{
		"179": "179", "192.0.2.1:179": "192.0.2.1:179", "[fd01::1]:179": "[fd01::1]:179", "*:179": "[::]:179", "[::ffff:192.0.2.1]:179": "192.0.2.1:179",
	} {
		if l, err := ParseListener(s); err != nil || l.String() != want {
			t.Errorf("%s: %s, %v", s, l, err)
		}
	}
}
