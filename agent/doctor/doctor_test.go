package doctor

import (
	"slices"
	"testing"

	"tsoagent/agent"
	"tsoagent/agent/flows"
)

func TestCheck(t *testing.T) {
	one := flows.Collateral{Listener: "0.0.0.0:179", Port: 179, MD5Keys: 1, Lost: 1, Processes: []flows.Process{{PID: 143, Name: "bgpd"}}}
	for name, tt := range map[string]struct {
		diagnosis agent.Diagnosis
		want      []Code
	}{
		// A device whose TSO somebody has switched off is not what the doctor looks for.
		"lost for another reason": {agent.Diagnosis{Connections: 9, Lost: 3}, []Code{}},
		"one listener":            {agent.Diagnosis{Collateral: []flows.Collateral{one}}, []Code{KeyCollateral}},
		"more than are listed":    {agent.Diagnosis{Collateral: []flows.Collateral{one, {Lost: 2}}, MoreCollateral: 1}, []Code{KeyCollateral, KeyCollateral, KeyCollateral}},
		"unreadable":              {agent.Diagnosis{Unreadable: "no BTF"}, []Code{Unreadable}},
	} {
		c := Check(&Patient{Diagnosis: &tt.diagnosis})
		got := []Code{}
		for _, f := range c.Findings {
			got = append(got, f.Code)
			if f.Title == "" || f.Text == "" || f.Do == "" || f.Page != Page(f.Code) {
				t.Errorf("%s: not whole: %+v", name, f)
			}
		}
		if !slices.Equal(got, tt.want) || c.Version != Version {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
	const want = "listener 0.0.0.0:179 of bgpd (pid 143) holds 1 TCP-MD5 key: 1 connection that is not signed has lost offload; 0 signed"
	if got := Collateral(&one); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
