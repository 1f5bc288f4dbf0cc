package doctor

import (
	"fmt"
	"strings"

	"tsoagent/agent"
	"tsoagent/xfrmwatch"
)

func saText(sa *xfrmwatch.SA) string {
	return fmt.Sprintf("%#x to %s", uint32(sa.SPI), sa.Dst)
}

// larval finds SAs that the kernel has asked for, and that nobody has delivered.
func (c *Checkup) larval(p *Patient) {
	const most = 16
	more := 0
	for sa := range p.Input.XFRM.SAs() {
		if !sa.Larval {
			continue
		}
		if more++; more > most {
			continue
		}
		text := fmt.Sprintf("an SA to %s", sa.Dst)
		if sa.Src.IsValid() && !sa.Src.IsUnspecified() {
			text += fmt.Sprintf(" from %s", sa.Src)
		}
		if sa.Reqid != 0 {
			text += fmt.Sprintf(" (reqid %d)", sa.Reqid)
		}
		if p.Now >= sa.AddTime && sa.AddTime > 0 {
			text += fmt.Sprintf(" is asked for since %d s", p.Now-sa.AddTime)
		} else {
			text += " is asked for"
		}
		c.found(LarvalSA, text)
	}
	if more > most {
		c.found(LarvalSA, fmt.Sprintf("%d more SAs are asked for", more-most))
	}
}

// needs are capabilities with what does not work without them.
var needs = []struct {
	name          string
	bit           uint // linux/capability.h
	what          string
	agent, always bool // of the agent alone; without it nothing works
	elsewhere     bool // only to follow other namespaces
}{
	{"CAP_NET_ADMIN", 12, "nothing can be read or written", false, true, false},
	{"CAP_BPF", 39, "sockets can't be looked at, nor can new TCP keys be seen at once", true, false, false},
	{"CAP_PERFMON", 38, "sockets can't be looked at, nor can new TCP keys be seen at once", true, false, false},
	{"CAP_SYS_ADMIN", 21, "other network namespaces can't be entered", true, false, true},
}

// capabilities finds what the agent, or who asks, may not do.
func (c *Checkup) capabilities(p *Patient) {
	for _, proc := range p.Processes {
		for _, n := range needs {
			if proc.Caps&(1<<n.bit) != 0 || n.agent && !proc.Agent || n.elsewhere && !proc.Elsewhere {
				continue
			}
			text := fmt.Sprintf("%s (pid %d) lacks %s: %s", proc.Name, proc.PID, n.name, n.what)
			if !proc.Agent {
				c.found(MissingCapability, text+"; run it as root")
				continue
			}
			file := "/etc/systemd/system/tsoagent.service.d/90-" + strings.ToLower(n.name) + ".conf"
			c.found(MissingCapability, text, "mkdir -p /etc/systemd/system/tsoagent.service.d",
				"printf '[Service]\\nCapabilityBoundingSet="+n.name+"\\n' >"+file, "systemctl daemon-reload", "systemctl restart tsoagent")
		}
	}
}

// word is a name as a word of a shell's command.
func word(name string) string { return agent.ShellWord(name) }
