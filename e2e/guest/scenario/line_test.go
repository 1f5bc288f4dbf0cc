package scenario

import "testing"

func TestExpandLine(t *testing.T) {
	for _, test := range []struct{ name, line, want string }{
		{"in", "in left ip link", "exec ip netns exec left ip link"},
		{"negated in", "! in left ping -c1 10.0.0.1", "! exec ip netns exec left ping -c1 10.0.0.1"},
		{"condition", "[exec:nft] ! in left nft list ruleset", "[exec:nft] ! exec ip netns exec left nft list ruleset"},
		{"in background", "in left tsoagent run &agent&", "exec env SCENARIO_NAME=agent ip netns exec left tsoagent run &agent&"},
		{"exec background", "! exec tsoagent run &agent&", "! exec env SCENARIO_NAME=agent tsoagent run &agent&"},
		{"unnamed background", "exec sleep 1 &", "exec sleep 1 &"},
		{"comment", "# in left there is a route", "# in left there is a route"},
		{"another command", "eventually 1s in left true", "eventually 1s in left true"},
		{"plain exec", "exec ip link", "exec ip link"},
		{"step", "step the SA's MTU # 1", "step 'the SA''s MTU # 1'"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := expandLine(test.line); got != test.want {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
}
