// The status page: it reads the metrics as Prometheus does, and shows nothing else. Names of devices and namespaces come from
// the kernel and can be anything, so all text is set as text.
"use strict";

const every = 5000; // ms

// parse reads the text format: the samples by name, each with its labels and its value.
function parse(text) {
	const all = new Map();
	for (const line of text.split("\n")) {
		if (!line || line[0] === "#") continue;
		const m = /^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)$/.exec(line);
		if (!m) continue;
		const labels = {};
		for (const [, key, value] of (m[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
			labels[key] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
		}
		if (!all.has(m[1])) all.set(m[1], []);
		all.get(m[1]).push({ labels, value: m[3] === "+Inf" ? Infinity : Number(m[3]) });
	}
	return all;
}

// A view is the samples of one namespace, or of all.
class View {
	constructor(all, netns) {
		this.all = all;
		this.netns = netns;
	}
	samples(name, want = {}) {
		return (this.all.get("tsoagent_" + name) || []).filter(
			(s) => (this.netns === undefined || s.labels.netns === this.netns) && Object.entries(want).every(([k, v]) => s.labels[k] === v),
		);
	}
	has(name) {
		return this.samples(name).length > 0;
	}
	sum(name, want) {
		return this.samples(name, want).reduce((n, s) => n + s.value, 0);
	}
	// by adds up by a label, the largest first, without what is 0.
	by(label, name, want) {
		const sums = new Map();
		for (const s of this.samples(name, want)) sums.set(s.labels[label], (sums.get(s.labels[label]) || 0) + s.value);
		return [...sums].filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
	}
	// quantile is that of the reactions since the start, in seconds: the upper bound of the class that it is in.
	quantile(q) {
		const classes = this.samples("reaction_seconds_bucket").map((s) => [s.labels.le === "+Inf" ? Infinity : Number(s.labels.le), s.value]);
		classes.sort((a, b) => a[0] - b[0]);
		const n = classes.length ? classes[classes.length - 1][1] : 0;
		const found = classes.find(([, count]) => count >= q * n);
		return n ? found[0] : NaN;
	}
}

const number = (n) => n.toLocaleString("en", { maximumFractionDigits: 1 });
const plural = (n, one, more = one + "s") => number(n) + " " + (n === 1 ? one : more);
const list = (pairs, what = (k, n) => number(n) + " " + k) => pairs.map(([k, n]) => what(k, n)).join(", ");

function duration(s) {
	if (s < 1) return number(s * 1000) + " ms";
	if (s < 120) return number(s) + " s";
	if (s < 7200) return number(Math.floor(s / 60)) + " min";
	if (s < 172800) return number(Math.floor(s / 3600)) + " h";
	return number(Math.floor(s / 86400)) + " days";
}

function element(tag, attributes, ...children) {
	const e = document.createElement(tag);
	for (const [k, v] of Object.entries(attributes || {})) if (v) e.setAttribute(k, v);
	e.append(...children);
	return e;
}

function card(title, value, note, level) {
	return element("div", { class: "card" }, element("h3", {}, title), element("b", { class: level }, value), element("span", { class: "note" }, note || ""));
}

function cards(v, rates) {
	const contested = v.sum("contested");
	const pending = v.sum("restores_pending");
	const failed = v.sum("actions_total", { result: "failed" });
	const lost = v.sum("connections_lost_offload");
	const reactions = v.sum("reaction_seconds_count");
	const out = [
		card("Coverages", number(v.sum("coverages")), list(v.by("kind", "coverages"))),
		card("Cut at", list(v.by("cut", "coverages"), (k) => k) || "–", list(v.by("cut", "coverages"))),
		card("Features held off", number(v.sum("holds", { state: "in place" })), list(v.by("state", "holds"))),
		card("Routes with an MTU", number(v.sum("locks") + v.sum("clones")), plural(v.sum("locks"), "in place", "in place") + ", " + plural(v.sum("clones"), "clone")),
		card("Inner MTU", list(v.by("mtu", "coverages_by_mtu").slice(0, 3), (k) => k) || "–", list(v.by("mtu", "coverages_by_mtu"), (k, n) => number(n) + " at " + k)),
		card("Reactions", reactions ? "≤ " + duration(v.quantile(0.99)) : "–", reactions ? plural(reactions, "reaction") + ", half within " + duration(v.quantile(0.5)) : "none yet"),
		card("Contested", number(contested), list(v.by("kind", "contested")), contested ? "bad" : ""),
		card("Not given back yet", number(pending), list(v.by("kind", "restores_pending")), pending ? "warn" : ""),
		card("Actions", number(v.sum("actions_total", { result: "done" })), plural(failed, "failure") + rates.actions, failed ? "warn" : ""),
		card("Kernel events", number(v.sum("source_events_total")), plural(v.sum("source_overruns_total"), "overrun") + rates.events),
	];
	if (v.has("connections")) {
		out.push(card("Connections", number(v.sum("connections")), lost ? number(lost) + " lost offload to somebody else's key" : "none lost offload to somebody else's key", lost ? "warn" : ""));
	}
	return element("div", { class: "cards" }, ...out);
}

// devices is a table of what is done on each.
function devices(v) {
	const names = new Set();
	for (const name of ["holds", "locks", "clones"]) for (const s of v.samples(name)) names.add(s.labels.device);
	if (!names.size) return "";
	const rows = [...names].sort().map((device) => {
		const held = v.by("state", "holds", { device });
		const on = v.samples("feature_active", { device }).filter((s) => s.value).length;
		const least = v.sum("lock_mtu_min_bytes", { device });
		const most = v.sum("lock_mtu_max_bytes", { device });
		return element("tr", {},
			element("td", {}, device),
			element("td", {}, list(held) || "–"),
			element("td", { class: on ? "warn" : "" }, held.length ? number(on) : "–"),
			element("td", {}, number(v.sum("locks", { device }))),
			element("td", {}, number(v.sum("clones", { device }))),
			element("td", {}, least === most ? (least ? String(least) : "–") : least + "–" + most),
		);
	});
	const heads = ["Device", "Held off", "Still on", "In place", "Clones", "MTU"].map((h) => element("th", { scope: "col" }, h));
	return element("div", { class: "wide" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
}

let before; // the samples of the last look, and when that was
let last; // when the agent answered last

function rate(view, name, netns) {
	if (!before) return "";
	const seconds = (performance.now() - before.at) / 1000;
	const n = view.sum(name) - new View(before.all, netns).sum(name);
	return n > 0 ? ", " + number(n / seconds) + "/s now" : "";
}

function show(all) {
	const whole = new View(all);
	const build = whole.samples("build_info")[0];
	if (!build) throw new Error("these are no metrics of tsoagent");
	const names = whole.samples("enforcing").map((s) => s.labels.netns).sort((a, b) => (a === "host" ? -1 : b === "host" ? 1 : a < b ? -1 : 1));
	const degraded = whole.sum("degraded") + whole.sum("namespaces", { state: "failed" }) + whole.sum("namespaces", { state: "waiting" });
	const state = document.getElementById("state");
	if (!names.length) [state.textContent, state.className] = ["reading the kernel's state", "state"];
	else if (degraded) [state.textContent, state.className] = ["needs a look", "state bad"];
	else if (!whole.sum("enforcing")) [state.textContent, state.className] = ["only observes", "state warn"];
	else [state.textContent, state.className] = ["all is well", "state good"];
	const since = Date.now() / 1000 - whole.sum("start_timestamp_seconds");
	document.getElementById("about").textContent = build.labels.version + ", up for " + duration(Math.max(since, 0)) +
		(whole.sum("config_last_reload_successful") ? "" : "; the newest configuration was refused: an older one is in use");
	const sections = names.map((netns) => {
		const v = new View(all, netns);
		const mode = (v.sum("enforcing") ? "enforce" : "observe") + (v.sum("paused") ? ", paused" : "");
		const stale = v.samples("source_stale").filter((s) => s.value).map((s) => s.labels.source);
		const trouble = [];
		if (v.sum("paused")) trouble.push("paused: nothing is written");
		if (v.sum("findings") || (v.sum("degraded") && !v.sum("paused"))) trouble.push(v.sum("findings") ? plural(v.sum("findings"), "finding") : "something needs a look");
		if (stale.length) trouble.push("reading again: " + stale.join(", "));
		return element("section", {},
			element("h2", {}, names.length > 1 ? "Namespace " + netns + ", mode " + mode : "Mode " + mode),
			...(trouble.length ? [element("p", { class: "bad" }, trouble.join("; ") + ". `tsoctl status" + (netns === "host" ? "" : " --netns " + netns) + "` says what.")] : []),
			cards(v, { actions: rate(v, "actions_total", netns), events: rate(v, "source_events_total", netns) }),
			devices(v),
		);
	});
	const main = document.getElementById("namespaces");
	main.replaceChildren(...sections);
	main.className = "";
	before = { all, at: performance.now() };
	last = new Date();
	document.getElementById("read").textContent = "Read at " + last.toLocaleTimeString() + ", and every " + duration(every / 1000) + ".";
}

async function look() {
	try {
		const answer = await fetch("metrics", { headers: { Accept: "text/plain" }, cache: "no-store", signal: AbortSignal.timeout(every) });
		if (!answer.ok) throw new Error("HTTP status " + answer.status);
		show(parse(await answer.text()));
	} catch (e) {
		const state = document.getElementById("state");
		[state.textContent, state.className] = ["does not answer", "state bad"];
		document.getElementById("namespaces").className = "old";
		document.getElementById("read").textContent = (last ? "Read at " + last.toLocaleTimeString() + ", since then: " : "") + e.message;
	}
	setTimeout(look, every);
}

look();
