package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"tsoagent/agent"
	"tsoagent/agent/client"
	"tsoagent/agent/doctor"
	"tsoagent/agent/flows"
	"tsoagent/agent/netns"
	"tsoagent/cmd/internal/inert"
)

func flowsCommand() *cli.Command {
	return &cli.Command{
		Name: "flows", Usage: "TCP connections: what covers each, where it is cut, and why; works without an agent",
		OnUsageError: usage, Action: showFlows,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "lost", Usage: "only connections that have lost offload without being covered"},
			&cli.StringFlag{Name: "listener", Usage: "only connections that came from this listener, `[ADDRESS:]PORT`, and client ones from that port"},
			&cli.StringFlag{Name: "dev", Usage: "only connections that leave by the device `NAME`"},
			&cli.StringFlag{Name: "state", Usage: "only sockets in this `STATE`, as ss(8) calls it; several are separated by commas, or all"},
			&cli.BoolFlag{Name: "processes", Aliases: []string{"p"}, Usage: "also show who has each connection open"},
		},
	}
}

// flowFilter is what the flags ask for.
func flowFilter(c *cli.Context) (flows.Filter, error) {
	f := flows.Filter{Lost: c.Bool("lost"), Device: c.String("dev"), Processes: c.Bool("processes")}
	var err error
	if c.IsSet("listener") {
		if f.Listener, err = flows.ParseListener(c.String("listener")); err != nil {
			return f, fmt.Errorf("--listener: %w", err)
		}
	}
	if c.IsSet("state") {
		if f.States, err = flows.ParseStates(c.String("state")); err != nil {
			return f, fmt.Errorf("--state: %w", err)
		}
	}
	if c.IsSet("dev") && f.Device == "" {
		return f, errors.New("--dev: the name of a device is missing")
	}
	return f, nil
}

func showFlows(c *cli.Context) error {
	cfg, ns, err := plainCall(c)
	if err != nil {
		return err
	}
	f, err := flowFilter(c)
	if err != nil {
		return cli.Exit(err.Error(), exitUsage)
	}
	out := bufio.NewWriterSize(c.App.Writer, 64<<10)
	p := pageOf(c.App.Writer)
	p.Writer = inert.Writer{Writer: out}
	var list flowList
	switch option(c, "output") {
	case "json":
		list = &flowJSON{w: out}
	case "yaml":
		list = &flowYAML{w: out}
	default:
		list = &flowTable{page: p}
	}
	r, err := eachFlow(c.Context, cfg, ns, f, list.flow)
	if err != nil {
		return err
	}
	return errors.Join(list.end(r), out.Flush())
}

// eachFlow asks the agent, or reads the kernel where none runs.
func eachFlow(ctx context.Context, cfg agent.Config, ns string, f flows.Filter, fn func(*flows.Flow) error) (*flows.Result, error) {
	r, err := client.New(cfg.RunDir).FlowsIn(ctx, ns, f, fn)
	if errors.Is(err, client.ErrNoAgent) {
		return agent.FlowsIn(ctx, cmp.Or(ns, netns.Host), cfg, logAbove(slog.LevelError), version(), f, fn)
	}
	return r, err
}

// flowList prints flows as they come, so that a machine with a million of them does not have to keep
// them.
type flowList interface {
	flow(*flows.Flow) error
	end(*flows.Result) error
}

// flowJSON prints the document that flowsDocument describes.
type flowJSON struct {
	w   *bufio.Writer
	buf bytes.Buffer
	n   int
}

// flowsDocument is what -o json and -o yaml print: the flows, and what was found in all.
type flowsDocument struct {
	Version int          `json:"version"`
	Flows   []flows.Flow `json:"flows"`
	flows.Result
}

// flowsHead is how the document begins, as its version does in what Result has besides the flows.
var flowsHead = fmt.Sprintf("{\n  \"version\": %d,", flows.Version)

func (l *flowJSON) flow(f *flows.Flow) error {
	text := ",\n    "
	if l.n == 0 {
		text = flowsHead + "\n  \"flows\": [\n    "
	}
	l.n++
	if _, err := l.w.WriteString(text); err != nil {
		return err
	}
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	l.buf.Reset()
	if err := json.Indent(&l.buf, b, "    ", "  "); err != nil {
		return err
	}
	_, err = l.w.Write(inert.JSON(l.buf.Bytes()))
	return err
}

func (l *flowJSON) end(r *flows.Result) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	head := "\n  ],"
	if l.n == 0 {
		head = flowsHead + "\n  \"flows\": [],"
	}
	_, err = fmt.Fprintf(l.w, "%s%s\n", head, bytes.TrimPrefix(inert.JSON(b), []byte(flowsHead)))
	return err
}

// flowYAML keeps all of them: its encoder wants the whole document.
type flowYAML struct {
	w    io.Writer
	list []flows.Flow
}

func (l *flowYAML) flow(f *flows.Flow) error {
	l.list = append(l.list, *f)
	return nil
}

func (l *flowYAML) end(r *flows.Result) error {
	if l.list == nil {
		l.list = []flows.Flow{}
	}
	return showYAML(l.w, flowsDocument{flows.Version, l.list, *r})
}

// sized is how many flows are looked at to find how wide the columns have to be.
const sized = 500

// flowTable prints a row for each flow, with its reason at the end, or below it on a terminal.
type flowTable struct {
	page  page
	first []flows.Flow // those that wait for the widths
	wide  []int        // of the columns, nil while it is not known
	line  []byte
}

var flowHeads = []string{"LOCAL", "REMOTE", "STATE", "COVERED", "CUT", "DEVICE"}

// ssState is a state as ss(8) shows it; what it filters by is longer.
func ssState(name string) string {
	switch name {
	case "established":
		return "ESTAB"
	case "listening":
		return "LISTEN"
	case "closed":
		return "UNCONN"
	}
	return strings.ToUpper(name)
}

func flowCells(f *flows.Flow) []string {
	covered := "no"
	switch f.Coverage {
	case flows.CoveredByKey:
		covered = "key"
	case flows.CoveredByPolicy:
		covered = "policy"
		if f.Policy != 0 {
			covered = "policy " + strconv.FormatUint(uint64(f.Policy), 10)
		}
	}
	cut := string(f.Segmentation)
	switch {
	case f.Segmentation == flows.CutUnknown:
		cut = "-"
	case f.Lost:
		cut += ", lost"
	}
	return []string{f.Local, cmp.Or(f.Remote, "-"), ssState(f.State), covered, cut, cmp.Or(f.Device, "-")}
}

func (t *flowTable) flow(f *flows.Flow) error {
	if t.wide != nil {
		t.row(f)
		return nil
	}
	if t.first = append(t.first, *f); len(t.first) == sized {
		t.begin()
	}
	return nil
}

// begin finds the widths, and prints what has waited for them.
func (t *flowTable) begin() {
	if len(t.first) == 0 {
		return
	}
	t.wide = make([]int, len(flowHeads))
	widen := func(cells []string) {
		for i, c := range cells {
			t.wide[i] = max(t.wide[i], utf8.RuneCountInString(c))
		}
	}
	widen(flowHeads)
	for i := range t.first {
		widen(flowCells(&t.first[i]))
	}
	t.narrow()
	why := "WHY"
	if t.page.width > 0 {
		why = "" // it stands below
	}
	t.cells(flowHeads, why)
	for i := range t.first {
		t.row(&t.first[i])
	}
	t.first = nil
}

// narrow takes from the columns of addresses what the page has no room for. What one doesn't need the
// other one gets.
func (t *flowTable) narrow() {
	if t.page.width == 0 {
		return
	}
	room := t.page.width - 2*len(gap)
	for _, w := range t.wide[2:] {
		room -= w + len(gap)
	}
	room += len(gap) // none after the last
	local, remote := t.wide[0], t.wide[1]
	if local+remote <= room {
		return
	}
	half := max(room/2, 0)
	t.wide[0] = min(local, max(half, room-remote))
	t.wide[1] = min(remote, max(half, room-local))
}

// row prints a flow. What the lines below it say belongs to its own line where nothing is wrapped, so
// that it can be searched for.
func (t *flowTable) row(f *flows.Flow) {
	notes := flowNotes(f)
	if t.page.width == 0 {
		t.cells(flowCells(f), strings.Join(notes, "; "))
		return
	}
	t.cells(flowCells(f), "")
	for _, n := range notes {
		t.page.text(2, "%s", n)
	}
}

func flowNotes(f *flows.Flow) []string {
	var out []string
	if f.Why != "" {
		out = append(out, f.Why)
	}
	if f.Contradiction != "" {
		out = append(out, "! "+f.Contradiction)
	}
	if len(f.Processes) > 0 {
		out = append(out, fmt.Sprintf("uid %d, %s", f.UID, doctor.Processes(f.Processes)))
	}
	return out
}

// cells prints one row. Where the addresses have no room, the rest stands in its columns one line below.
func (t *flowTable) cells(cells []string, note string) {
	both := t.wide[0] + len(gap) + t.wide[1]
	b := t.line[:0]
	b = append(b, cells[0]...)
	b = append(pad(b, t.wide[0]), gap...)
	b = append(b, cells[1]...)
	if t.page.width > 0 && utf8.RuneCount(b) > both {
		_, _ = t.page.Write(append(b, '\n'))
		b = b[:0]
	}
	at := both
	for i, c := range cells[2:] {
		b = append(append(pad(b, at), gap...), c...)
		at += len(gap) + t.wide[2+i]
	}
	if note != "" {
		b = append(append(pad(b, at), gap...), note...)
	}
	_, _ = t.page.Write(append(b, '\n')) // as with Fprintln, nothing helps where stdout is gone
	t.line = b
}

func (t *flowTable) end(r *flows.Result) error {
	if t.wide == nil {
		t.begin()
	}
	if t.wide != nil {
		fmt.Fprintln(t.page)
	}
	flowSummary(t.page, r)
	return nil
}

// flowSummary says in a few lines what was found in all.
func flowSummary(p page, r *flows.Result) {
	s := r.Summary
	if !r.Live {
		p.text(0, "no agent runs; read from the kernel")
	}
	if r.Netns != "" {
		p.text(0, "network namespace %s", r.Netns)
	}
	head := count(s.Connections, "connection", "connections")
	if s.Shown != s.Connections {
		head = fmt.Sprintf("%s, %d shown", head, s.Shown)
	}
	if s.Shown > 0 {
		head += fmt.Sprintf(": %d covered by a policy, %d by a key; cut by offload %d, software %d, socket %d, not known %d",
			s.Policy, s.Key, s.Offload, s.Software, s.None, s.Unknown)
	}
	p.text(0, "%s", head)
	if s.Lost > 0 {
		p.text(0, "! %s offload without being covered", count(s.Lost, "has lost", "have lost"))
	}
	if s.Contradictions > 0 {
		p.text(0, "! %s", count(s.Contradictions, "contradiction", "contradictions"))
	}
	for i := range r.Collateral {
		p.text(0, "! %s", doctor.Collateral(&r.Collateral[i]))
	}
	if r.MoreCollateral > 0 {
		p.text(0, "! and %s of more listeners", count(r.MoreCollateral, "connection", "connections"))
	}
	if len(r.Collateral) > 0 {
		p.text(0, "`tsoctl doctor` says what helps")
	}
	if r.Stale {
		p.text(0, "! policies or devices are being read again: what covers a connection may be wrong")
	}
	for _, n := range r.Notes {
		p.text(0, "! %s", n)
	}
}
