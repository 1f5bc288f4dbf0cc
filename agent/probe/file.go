package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"tsoagent/trust"
)

// DefaultStateDir is where the result is kept.
const DefaultStateDir = "/var/lib/tsoagent"

// FileIn is the result's file in a state directory.
func FileIn(stateDir string) string { return filepath.Join(stateDir, "probe.json") }

// Writable makes sure, ahead of a probe, that its result can be saved in a state directory,
// which it makes if it is missing.
func Writable(stateDir string) error {
	err := os.MkdirAll(stateDir, 0o755)
	if err == nil {
		var f *os.File
		if f, err = os.CreateTemp(stateDir, ".probe-*"); err == nil {
			err = errors.Join(f.Close(), os.Remove(f.Name()))
		}
	}
	if err != nil {
		return fmt.Errorf("probe: state directory: %w", err)
	}
	return nil
}

// maxResult bounds a result's file, in bytes. One with all cases has less than a tenth of that.
const maxResult = 1 << 20

// Load reads a result, if nobody but root, or who asks, can have written it. The error is os.ErrNotExist (errors.Is) where there is none. Whether it
// is of the kernel that runs, Valid tells.
func Load(path string) (*Result, error) {
	b, err := trust.ReadFile(path, maxResult)
	if err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	r, err := decodeResult(b)
	if err != nil {
		return nil, fmt.Errorf("probe: %s: %w", path, err)
	}
	return r, nil
}

func decodeResult(b []byte) (*Result, error) {
	var head struct{ Version int }
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, err
	}
	if head.Version != Version {
		return nil, fmt.Errorf("it has version %d, not %d: probe again", head.Version, Version)
	}
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, err
	}
	for i, c := range r.Cases {
		if c.Outer != IPv4 && c.Outer != IPv6 {
			return nil, fmt.Errorf("case %d has no address family: probe again", i)
		}
	}
	return &r, nil
}

// Save writes a result, readable by everybody. A reader sees the old one or the new one whole.
// The directory is made if it is missing.
func (r *Result) Save(path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("probe: save the result: %w", err)
		}
	}()
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // gone already where all went well
	_, err = f.Write(append(b, '\n'))
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
