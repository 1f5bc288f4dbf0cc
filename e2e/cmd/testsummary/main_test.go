package main

import (
	"strings"
	"testing"
)

func TestSummarise(t *testing.T) {
	const in = `{"Action":"start","Package":"p"}
{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"run","Package":"p","Test":"TestA/one"}
{"Action":"output","Package":"p","Test":"TestA/one","Output":"    a_test.go:1: broken\n"}
{"Action":"fail","Package":"p","Test":"TestA/one","Elapsed":0}
{"Action":"run","Package":"p","Test":"TestA/two"}
{"Action":"pass","Package":"p","Test":"TestA/two","Elapsed":61.5}
{"Action":"fail","Package":"p","Test":"TestA","Elapsed":62}
{"Action":"run","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Test":"TestB","Output":"=== RUN   TestB\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"    e_test.go:3: b_test.go:7: no ESP in this kernel\n"}
{"Action":"output","Package":"p","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestB","Elapsed":0}
{"Action":"output","Package":"p","Output":"FAIL\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.010s\n"}
{"Action":"fail","Package":"p","Elapsed":0.01}
{"Action":"output","Package":"q","Output":"ok  \tq\t0.010s\n"}
{"Action":"pass","Package":"q","Elapsed":0.01}
{"ImportPath":"r","Action":"build-output","Output":"r/r.go:1: syntax error\n"}
{"Action":"output","Package":"r","Output":"FAIL\tr [build failed]\n"}
{"Action":"fail","Package":"r","Elapsed":0,"FailedBuild":"r"}
`
	const want = `
p TestA/one
    a_test.go:1: broken

p TestA
=== RUN   TestA
FAIL	p	0.010s
ok  	q	0.010s
FAIL	r [build failed]
r/r.go:1: syntax error

skipped:
     1  no ESP in this kernel

took longest:
   62s  p TestA/two

1 passed, 2 failed, 1 skipped
`
	var out strings.Builder
	failed, err := summarise(strings.NewReader(in), &out, extras{})
	if err != nil || !failed {
		t.Errorf("failed %v, error %v", failed, err)
	}
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestSummariseOfNothingFails(t *testing.T) {
	if failed, err := summarise(strings.NewReader(""), &strings.Builder{}, extras{}); !failed || err == nil {
		t.Errorf("failed %v, error %v", failed, err)
	}
}

func TestUnfinishedTestFails(t *testing.T) {
	const in = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
`
	var out strings.Builder
	failed, err := summarise(strings.NewReader(in), &out, extras{})
	if err != nil || !failed || !strings.HasSuffix(out.String(), "\n0 passed, 1 failed, 0 skipped\n") {
		t.Errorf("failed %v, error %v, output\n%s", failed, err, out.String())
	}
}

func TestExtrasAreCounted(t *testing.T) {
	const in = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"pass","Package":"p","Test":"TestA"}
`
	var out strings.Builder
	failed, err := summarise(strings.NewReader(in), &out, extras{failed: []string{"lint"}, skipped: []string{"no database"}})
	if err != nil || !failed || !strings.HasSuffix(out.String(), "     1  no database\n\n1 passed, 1 failed, 1 skipped\n") {
		t.Errorf("failed %v, error %v, output\n%s", failed, err, out.String())
	}
}
