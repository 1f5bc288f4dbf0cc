package flows

import (
	"net/url"
	"reflect"
	"testing"
)

// FuzzFilterFrom: a filter that was understood is, written again, the same one.
func FuzzFilterFrom(f *testing.F) {
	for _, s := range []string{"", "lost=true&dev=eth0", "listener=179", "listener=%5Bfd00::1%5D:179&state=estab,listen", "listener=*:80&processes=1", "listener=[::ffff:10.0.0.1]:80", "state=all,ALL, closed"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, query string) {
		v, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		q, err := FilterFrom(v)
		if err != nil {
			return
		}
		if again, err := FilterFrom(q.Values()); err != nil || !reflect.DeepEqual(again, q) {
			t.Errorf("%+v is %q, and that is %+v, %v", q, q.Values().Encode(), again, err)
		}
		if len(q.States) > len(StateList()) {
			t.Errorf("%d states", len(q.States))
		}
	})
}
