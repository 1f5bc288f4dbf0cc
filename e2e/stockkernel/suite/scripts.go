// Package suite says which scenarios run on the stock kernels and with which cards, and makes the table of what came of it.
package suite

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// patterns are the scenarios for stock kernels: those that need what the test kernel lacks, the story, and all others. Where the time is
// short the last ones are left out.
var patterns = []string{"testdata/stockkernel/*.txtar", "testdata/scenarios/10-story.txtar", "testdata/scenarios/*.txtar"}

// Script is a scenario, or one variant of it.
type Script struct {
	File    string // below e2e
	Variant string
	Text    []byte
}

// Name is the scenario's, with its variant behind a slash.
func (s Script) Name() string {
	if s.Variant != "" {
		return s.Scenario() + "/" + s.Variant
	}
	return s.Scenario()
}

// Scenario is the name without the variant.
func (s Script) Scenario() string { return strings.TrimSuffix(filepath.Base(s.File), ".txtar") }

// variantFile is the head of a file that sets the environment of one variant of a scenario.
var variantFile = regexp.MustCompile(`(?m)^-- variant-([\w-]+)\.env --$`)

// Variants returns the scenario in a file of the directory e2e once for each of its variants.
func Variants(e2e, file string) ([]Script, error) {
	text, err := os.ReadFile(filepath.Join(e2e, file))
	if err != nil {
		return nil, err
	}
	var scripts []Script
	for _, v := range variantFile.FindAllSubmatch(text, -1) {
		scripts = append(scripts, Script{file, string(v[1]), text})
	}
	if scripts == nil {
		scripts = []Script{{file, "", text}}
	}
	return scripts, nil
}

// Scripts returns all scenarios for stock kernels in their order, of those in the directory e2e.
func Scripts(e2e string) ([]Script, error) {
	var files []string
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(e2e, pattern))
		if err != nil || len(found) == 0 {
			return nil, errors.Join(fmt.Errorf("no scenarios in %s", pattern), err)
		}
		for _, path := range found {
			file, err := filepath.Rel(e2e, path)
			if err != nil {
				return nil, err
			}
			if !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	var scripts []Script
	for _, file := range files {
		variants, err := Variants(e2e, file)
		if err != nil {
			return nil, err
		}
		scripts = append(scripts, variants...)
	}
	return scripts, nil
}

// laysWires finds the scenarios that have wires laid by e2e/guest/bin/nic, which takes the machine's cards.
var laysWires = regexp.MustCompile(`(?m)\bnic [a-z]+ [a-z]+(\$n|\d) [a-z]+ `)

// Cards returns the cards for the scenario's wires, in the order in which it gets them: another one comes first in each scenario and variant, and the
// same on each kernel; a variant that has the name of a card has that one. It is nil where the scenario lays no wires.
func (s Script) Cards(all []string) []string {
	if len(all) == 0 || !laysWires.Match(s.Text) || cardless[s.Name()] != "" {
		return nil
	}
	if slices.Contains(all, s.Variant) {
		return []string{s.Variant} // it is about that one
	}
	first := int(crc32.ChecksumIEEE([]byte(s.Name())) % uint32(len(all)))
	return slices.Concat(all[first:], all[:first])
}

// cardless are scenarios whose wires are veth pairs on stock kernels, too, and why.
var cardless = map[string]string{
	"62-stacks/v4":            vlans,
	"62-stacks/v6":            vlans,
	"64-lane/v4":              index,
	"64-lane/v6":              index,
	"69-md5/v4":               index,
	"69-md5/v6":               index,
	"62-stacks-ports/bond-v4": lacp,
	"62-stacks-ports/bond-v6": lacp,
	"62-stacks-ports/team-v4": "the far card does not see that a port is closed",
}

const (
	lacp  = "LACP joins links of one speed, and a virtio card says none"
	index = "the lane's name has the index of its device"
	vlans = "nothing comes through VLANs above a bond of QEMU's cards"
)

// alone are the scenarios that want a machine of their own, and why.
var alone = map[string]string{
	"50-probe":      "the modules that a kernel has not loaded yet",
	"60-probe":      "the modules that a kernel has not loaded yet",
	"80-doctor":     "the modules that a kernel has not loaded yet",
	"70-moved-card": "the machine's own namespace",
}

// Alone reports whether the scenario wants a machine of its own.
func (s Script) Alone() bool { return alone[s.Name()] != "" }
