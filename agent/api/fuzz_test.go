package api

import (
	"net/url"
	"testing"
)

// FuzzParseQuestion: a question that was understood is, written again, the same one.
func FuzzParseQuestion(f *testing.F) {
	for _, s := range []string{"dst=10.3.0.1&from=10.9.0.1", "dst=fd00::1&proto=6&port=443&mark=0x10", "dst=::ffff:10.0.0.1", "dst=fe80::1%25eth0", "from=10.0.0.1&port=65536", "dst=10.0.0.1&dst=::1&proto=0377"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		v, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		q, err := ParseQuestion(v)
		if err != nil {
			return
		}
		if !q.Dst.IsValid() || q.Dst.Is4In6() || q.From.IsValid() && q.From.Is4() != q.Dst.Is4() {
			t.Errorf("%q is %+v", query, q)
		}
		if again, err := ParseQuestion(q.Values()); err != nil || again != q {
			t.Errorf("%+v is %q, and that is %+v, %v", q, q.Values().Encode(), again, err)
		}
	})
}
