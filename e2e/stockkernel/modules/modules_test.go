package modules

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tree writes depmod's files as they look for Debian's 6.1.
func tree(t *testing.T) Tree {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"modules.dep": "kernel/net/ipv4/tunnel4.ko:\n" +
			"kernel/net/ipv6/tunnel6.ko:\n" +
			"kernel/net/ipv6/xfrm6_tunnel.ko: kernel/net/ipv6/tunnel6.ko\n" +
			"kernel/net/xfrm/xfrm_interface.ko: kernel/net/ipv6/xfrm6_tunnel.ko kernel/net/ipv6/tunnel6.ko kernel/net/ipv4/tunnel4.ko\n" +
			"kernel/crypto/gcm.ko:\n" +
			"kernel/net/ipv4/esp4.ko:\n" +
			"kernel/drivers/net/e1000e/e1000e.ko:\n",
		"modules.alias": "# Aliases extracted from modules themselves.\n" +
			"alias rtnl-link-xfrm xfrm_interface\n" +
			"alias crypto-rfc4106 gcm\n" +
			"alias xfrm-type-2-50 esp4\n" +
			"alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n" +
			"alias net-pf-10 ipv6\n",
		"modules.builtin": "kernel/net/ipv6/ipv6.ko\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Tree(dir)
}

func TestFiles(t *testing.T) {
	root := tree(t)
	for _, test := range []struct {
		name string
		want []string
		err  error
	}{
		{"xfrm-interface", []string{"net/ipv4/tunnel4.ko", "net/ipv6/tunnel6.ko", "net/ipv6/xfrm6_tunnel.ko", "net/xfrm/xfrm_interface.ko"}, nil},
		{"rtnl-link-xfrm", []string{"net/ipv4/tunnel4.ko", "net/ipv6/tunnel6.ko", "net/ipv6/xfrm6_tunnel.ko", "net/xfrm/xfrm_interface.ko"}, nil},
		{"xfrm-type-2-50", []string{"net/ipv4/esp4.ko"}, nil},
		{"pci:v00008086d000010D3sv00001AF4sd00001100bc02sc00i00", []string{"drivers/net/e1000e/e1000e.ko"}, nil},
		{"ipv6", nil, nil}, // built in
		// The kernel asks for this one first, then for the template's name.
		{"crypto-rfc4106(gcm(aes))", nil, ErrUnknown},
		{"crypto-rfc4106", []string{"crypto/gcm.ko"}, nil},
		{"", nil, ErrUnknown},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := root.Files(test.name)
			if !errors.Is(err, test.err) {
				t.Fatalf("error %v, want %v", err, test.err)
			}
			var want []string
			for _, file := range test.want {
				want = append(want, filepath.Join(string(root), "kernel", file))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if _, err := Tree(t.TempDir()).Files("esp4"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without depmod's files: error %v", err)
	}
}
