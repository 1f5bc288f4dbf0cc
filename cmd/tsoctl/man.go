package main

import "tsoagent/cmd/internal/manual"

// pages are the manual pages.
var pages = manual.Program{
	Exits: "0 done, 1 failed, 2 wrong usage, 3 degraded, 4 no agent is running.",
	Files: []manual.File{
		{Name: "/run/tsoagent/tsoagent.sock", Text: "the agent's control socket."},
		{Name: "/usr/share/doc/tsoagent/commands.md", Text: "each command with what it prints."},
	},
	Also: []string{"tsoagent", "ip-xfrm", "ip-route", "ethtool"},
}
