package scenario

import "testing"

func TestNormaliseMasksTimersAndSorts(t *testing.T) {
	const in = "unicast fd02::/64 dev b proto kernel scope global metric 256 expires 86399sec pref medium \n" +
		"unicast fd01::/64 dev a proto static scope global metric 1024 \n"
	const want = "unicast fd01::/64 dev a proto static scope global metric 1024\n" +
		"unicast fd02::/64 dev b proto kernel scope global metric 256 expires - pref medium\n"
	if got := normalise(in, true); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := normalise("", true); got != "" {
		t.Errorf("of nothing: %q", got)
	}
}
