package agent

import "tsoagent/agent/api"

// What goes over the control socket is api's. The loop and its callers know it by these names.
type (
	// Mode is api.Mode.
	Mode = api.Mode
	// Report is api.Report.
	Report = api.Report
	// SourceReport is api.SourceReport.
	SourceReport = api.SourceReport
	// CoverageReport is api.CoverageReport.
	CoverageReport = api.CoverageReport
	// HoldReport is api.HoldReport.
	HoldReport = api.HoldReport
	// LockReport is api.LockReport.
	LockReport = api.LockReport
	// RuleReport is api.RuleReport.
	RuleReport = api.RuleReport
	// CloneReport is api.CloneReport.
	CloneReport = api.CloneReport
	// LaneReport is api.LaneReport.
	LaneReport = api.LaneReport
	// ClampReport is api.ClampReport.
	ClampReport = api.ClampReport
	// DeviceMTUReport is api.DeviceMTUReport.
	DeviceMTUReport = api.DeviceMTUReport
	// Diagnosis is api.Diagnosis.
	Diagnosis = api.Diagnosis
	// Counters is api.Counters.
	Counters = api.Counters
	// NamespaceReport is api.NamespaceReport.
	NamespaceReport = api.NamespaceReport
	// Explanation is api.Explanation.
	Explanation = api.Explanation
	// StepCost is api.StepCost.
	StepCost = api.StepCost
	// CostItem is api.CostItem.
	CostItem = api.CostItem
	// Question is api.Question.
	Question = api.Question
	// AbsentError is api.AbsentError.
	AbsentError = api.AbsentError
)

// The constants of api.
const (
	ReportVersion = api.Version

	Enforce = api.Enforce
	Observe = api.Observe

	StateInPlace   = api.StateInPlace
	StateWanted    = api.StateWanted
	StateContested = api.StateContested
	StateRefused   = api.StateRefused
	StateReleasing = api.StateReleasing
	StateNotOurs   = api.StateNotOurs

	NetnsFollowed = api.NetnsFollowed
	NetnsStarting = api.NetnsStarting
	NetnsLeaving  = api.NetnsLeaving
	NetnsFailed   = api.NetnsFailed
	NetnsWaiting  = api.NetnsWaiting

	DefaultRunDir = api.DefaultRunDir
)

// SocketPath is where the control socket of an agent with this run directory is.
func SocketPath(runDir string) string { return api.SocketPath(runDir) }
