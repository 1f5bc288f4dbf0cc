package scenario

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// pollInterval is the pause between two looks at something that is to come true.
const pollInterval = 20 * time.Millisecond

// A condition is a parsed `eventually` line.
type condition struct {
	deadline time.Duration
	negated  bool // the command is to fail
	args     []string

	pattern   *regexp.Regexp // what stdout is to match; nil for no matter
	unmatched bool           // …or not to match
}

const eventuallyUsage = "eventually deadline [!] command… [-- [!] stdout regexp]"

// parseEventually parses the words behind `eventually`.
func parseEventually(args []string) (*condition, error) {
	if len(args) < 2 {
		return nil, usage(eventuallyUsage)
	}
	deadline, err := parsePatience(args[0])
	if err != nil {
		return nil, usage(err.Error())
	}
	c := &condition{deadline: deadline, args: args[1:]}

	if i := slices.Index(c.args, "--"); i >= 0 {
		match := c.args[i+1:]
		c.args = c.args[:i]
		if len(match) > 0 && match[0] == "!" {
			c.unmatched, match = true, match[1:]
		}
		if len(match) != 2 || match[0] != "stdout" {
			return nil, usage(eventuallyUsage)
		}
		if c.pattern, err = regexp.Compile("(?m)" + match[1]); err != nil {
			return nil, usage(err.Error())
		}
	}
	if len(c.args) > 0 && c.args[0] == "!" {
		c.negated, c.args = true, c.args[1:]
	}
	if len(c.args) == 0 {
		return nil, usage(eventuallyUsage)
	}
	return c, nil
}

// met returns nil if the outcome of one try is what the line asks for.
func (c *condition) met(stdout string, err error) error {
	switch {
	case err != nil && !c.negated:
		return err
	case err == nil && c.negated:
		return errors.New("unexpected success")
	case c.pattern == nil:
		return nil
	case c.unmatched && c.pattern.MatchString(stdout):
		return fmt.Errorf("unexpected match for %#q", c.pattern)
	case !c.unmatched && !c.pattern.MatchString(stdout):
		return fmt.Errorf("no match for %#q", c.pattern)
	}
	return nil
}

// eventually repeats a command until it does what is asked, or the deadline is over.
func (s *session) eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("unsupported: ! eventually (use eventually deadline ! command)")
	}
	c, err := parseEventually(args)
	ts.Check(err)

	run := s.repeatable()[c.args[0]]
	rest := c.args[1:]
	if run == nil {
		run, rest = s.execute, c.args
	}

	// One try may take as long as there is time left, and always gets a chance: a slow machine that
	// comes to its first try late should say what it saw.
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), c.deadline)
	defer cancel()
	before := "" // what the last try said that had its time
	for tries := 1; ; tries++ {
		stdout, err := run(ctx, ts, rest)
		if errors.Is(err, errUsage) {
			ts.Fatalf("eventually: %v", err)
		}
		unmet := c.met(stdout, err)
		if unmet == nil && err != nil && ctx.Err() != nil {
			// The deadline killed it: that it failed says nothing of what was asked.
			unmet = fmt.Errorf("killed at the deadline: %w", err)
		}
		took := time.Since(start)
		if unmet == nil {
			ts.Logf("[true after %v, %d tries]", took.Round(time.Millisecond), tries)
			fmt.Fprint(ts.Stdout(), stdout)
			return
		}
		if ctx.Err() == nil {
			before = stdout
		}
		if took+pollInterval > c.deadline {
			if before != stdout {
				fmt.Fprintf(ts.Stdout(), "%s[and was killed at the last try, having said this]\n", before)
			}
			fmt.Fprint(ts.Stdout(), stdout)
			if err != nil {
				fmt.Fprintln(ts.Stderr(), err)
			}
			ts.Fatalf("eventually: not within %v (%d tries): %v", c.deadline, tries, unmet)
		}
		time.Sleep(pollInterval)
	}
}

// execute runs a program inside eventually: `exec program…`, `in namespace program…`, or only the program.
func (s *session) execute(ctx context.Context, ts *testscript.TestScript, args []string) (string, error) {
	switch {
	case args[0] == "exec" && len(args) >= 2:
		args = args[1:]
	case args[0] == "in" && len(args) >= 3:
		args = append([]string{"ip", "netns", "exec"}, args[1:]...)
	}
	stdout, stderr, err := s.program(ctx, ts, args)
	if err != nil && stderr != "" {
		err = fmt.Errorf("%w: %s", err, stderr)
	}
	return stdout, err
}
