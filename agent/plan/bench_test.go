package plan

import (
	"fmt"
	"strings"
	"testing"

	"tsoagent/xfrmwatch"
)

// BenchmarkMake plans from scratch, in the worlds that large hosts have. The time for a
// coverage must not grow with their number.
func BenchmarkMake(b *testing.B) {
	const outside = "link 1 lo\nlink 2 eth0\nlink 3 eth1\nlink 4 xfrm0 if_id 7\nroute 192.0.2.0/24 dev eth0 proto kernel\n"
	worlds := []struct {
		name  string
		head  string
		lines func(i int) string
	}{
		{"xfrmi routes", outside + "sa esp 192.0.2.1 192.0.2.2 spi 1 gcm if_id 7\n", func(i int) string {
			return fmt.Sprintf("route 10.%d.%d.0/24 dev xfrm0\npolicy %d src 0.0.0.0/0 dst 10.%[1]d.%[2]d.0/24 if_id 7 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i>>8, i&255, i+1)
		}},
		{"xfrmi default route", outside + "route 0.0.0.0/0 dev xfrm0\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm if_id 7\n", func(i int) string {
			return fmt.Sprintf("policy %d src 0.0.0.0/0 dst 10.%d.%d.0/24 if_id 7 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i+1, i>>8, i&255)
		}},
		{"one source net", outside + "route 0.0.0.0/0 via 192.0.2.9 dev eth0\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm\n", func(i int) string {
			return fmt.Sprintf("policy %d src 172.16.0.0/16 dst 10.%d.%d.0/24 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i+1, i>>8, i&255)
		}},
		{"many sources", outside + "route 0.0.0.0/0 via 192.0.2.9 dev eth0\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm\n", func(i int) string {
			return fmt.Sprintf("policy %d src 10.%d.%d.0/24 dst 172.16.0.0/16 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i+1, i>>8, i&255)
		}},
		{"dedicated nic", outside + "route 10.0.0.0/8 dev eth1\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm\ndefault block\n", func(i int) string {
			return fmt.Sprintf("policy %d src 0.0.0.0/0 dst 10.%d.%d.0/24 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i+1, i>>8, i&255)
		}},
		{"transport peers", outside + "route 10.0.0.0/8 dev eth1\npolicy 1 src 0.0.0.0/0 dst 10.0.0.0/8 tmpl esp transport\n", func(i int) string {
			return fmt.Sprintf("sa esp 192.0.2.1 10.%d.%d.1 spi 1 gcm transport\nlast 1 peer 10.%[1]d.%[2]d.2 1400\n", i>>8, i&255)
		}},
		{"many peers", outside + "route 0.0.0.0/0 via 192.0.2.9 dev eth0\n", func(i int) string {
			return fmt.Sprintf("policy %d src 172.16.0.0/16 dst 10.%d.%d.0/24 tmpl esp tunnel 192.0.2.1 11.%[2]d.%[3]d.1 reqid %[1]d\nsa esp 192.0.2.1 11.%[2]d.%[3]d.1 spi %[1]d reqid %[1]d gcm\n", i+1, i>>8, i&255)
		}},
	}
	for _, world := range worlds {
		for _, n := range []int{10, 1000, 10000} {
			b.Run(fmt.Sprintf("%s/%d", world.name, n), func(b *testing.B) {
				if testing.Short() && n > 10 {
					b.Skip("large")
				}
				var text strings.Builder
				text.WriteString(world.head)
				for i := range n {
					text.WriteString(world.lines(i))
				}
				w, err := newWorld(text.String())
				if err != nil {
					b.Fatal(err)
				}
				in := w.input()
				b.ReportAllocs()
				for b.Loop() {
					Make(in)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/coverage")
			})
		}
	}
}

// BenchmarkFollow adds a policy to a plan and takes it away again. What that costs must not grow with the
// number of coverages.
func BenchmarkFollow(b *testing.B) {
	for _, n := range []int{10, 1000, 10000, 100000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			if testing.Short() && n > 10 {
				b.Skip("large")
			}
			var text strings.Builder
			text.WriteString("config max_clones 200000\nlink 1 lo\nlink 2 eth0\nroute 192.0.2.0/24 dev eth0 proto kernel\nroute 0.0.0.0/0 via 192.0.2.9 dev eth0\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm\n")
			policy := "policy %d src 172.16.0.0/16 dst %d.%d.%d.0/24 tmpl esp tunnel 192.0.2.1 192.0.2.2\n"
			for i := range n {
				fmt.Fprintf(&text, policy, i+1, 10+i>>16, i>>8&255, i&255)
			}
			f, err := newFollowed(text.String())
			if err != nil {
				b.Fatal(err)
			}
			in := f.input()
			f.Plan(in, f.changes)
			if err := f.apply(f.Steps(in, f.held)); err != nil {
				b.Fatal(err)
			}
			f.Plan(in, Changes{All: true})
			f.Steps(in, f.held)
			line := strings.Fields(fmt.Sprintf(policy, n+1, 9, 1, 1))
			b.ReportAllocs()
			for b.Loop() {
				for _, there := range []bool{true, false} {
					f.changes = Changes{}
					if there {
						err = f.line(line[0], &words{w: line[1:]})
					} else {
						f.db.Apply(xfrmwatch.PolicyGone{Index: xfrmwatch.PolicyIndex(n + 1)})
					}
					f.Plan(in, f.changes)
					f.Steps(in, f.held)
				}
			}
			if err != nil || f.Anew != 2 {
				b.Fatal(err, f.Anew)
			}
		})
	}
}

// BenchmarkSteps works out the steps to a plan whose clones are all missing, and to one whose clones are all in place.
func BenchmarkSteps(b *testing.B) {
	const n = 20000
	var text strings.Builder
	text.WriteString("config max_clones 200000\nlink 1 lo\nlink 2 eth0\nroute 192.0.2.0/24 dev eth0 proto kernel\nroute 0.0.0.0/0 via 192.0.2.9 dev eth0\nsa esp 192.0.2.1 192.0.2.2 spi 1 gcm\n")
	for i := range n {
		fmt.Fprintf(&text, "policy %d src 172.%d.0.0/16 dst %d.%d.%d.0/24 tmpl esp tunnel 192.0.2.1 192.0.2.2\n", i+1, 16+i%2, 10+i>>16, i>>8&255, i&255)
	}
	for _, there := range []bool{false, true} {
		b.Run(fmt.Sprintf("there=%v", there), func(b *testing.B) {
			f, err := newFollowed(text.String())
			if err != nil {
				b.Fatal(err)
			}
			in := f.input()
			f.Plan(in, f.changes)
			steps := f.Steps(in, f.held)
			if len(steps.Clones) != n {
				b.Fatalf("%d clones", len(steps.Clones))
			}
			if there {
				if err := f.apply(steps); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				f.Relook()
				f.Steps(in, f.held)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/clone")
		})
	}
}
