package scenario

import (
	"regexp"
	"strings"
)

var (
	// inForm is `in NS command…`, possibly behind conditions and a negation.
	inForm = regexp.MustCompile(`^(\s*(?:\[[^\]]*\]\s*)*(?:!\s+)?)in\s+(\S+)\s+`)
	// backgroundForm is `exec command… &name&`.
	backgroundForm = regexp.MustCompile(`^(\s*(?:\[[^\]]*\]\s*)*(?:!\s+)?)exec\s+(.*\s)&([a-zA-Z_0-9]+)&\s*$`)
	// stepForm is `step text`, whose text may have apostrophes and number signs in it.
	stepForm = regexp.MustCompile(`^(\s*(?:\[[^\]]*\]\s*)*)step\s+(.*\S)\s*$`)
)

// backgroundVariable names a background command to `signal` and `killagent`.
const backgroundVariable = "SCENARIO_NAME"

// expandLine turns our line forms into testscript's own exec, which alone has background commands,
// negation and the output for stdout and stderr; testscript doesn't let commands of ours take part in that.
//
//	in NS cmd args…         exec ip netns exec NS cmd args…
//	exec cmd args… &name&   exec env SCENARIO_NAME=name cmd args… &name&
//	step text               step 'text', so that the text is what it looks like
//
// The second makes the process findable by its name in BackgroundCmds, which keeps names to itself. Both `ip netns exec`
// and `env` exec the program in place: a signal reaches it and no one else.
func expandLine(line string) string {
	if strings.HasPrefix(line, "#") {
		return line
	}
	if m := stepForm.FindStringSubmatch(line); m != nil {
		return m[1] + "step '" + strings.ReplaceAll(m[2], "'", "''") + "'"
	}
	line = inForm.ReplaceAllString(line, "${1}exec ip netns exec ${2} ")
	return backgroundForm.ReplaceAllString(line, "${1}exec env "+backgroundVariable+"=${3} ${2}&${3}&")
}
