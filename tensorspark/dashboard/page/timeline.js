// What every worker is at, row by row, and who waits for whom.

import { clock, duration, listed, percent, plural } from "./format.js";
import { ACTIVITIES, color, figure, onHover, onScheme, sayEmpty, source, summarize } from "./plots.js";
import { store } from "./store.js";

const ROW_PX = 22;
const FRAME_PX = 62;
const EVENTS = {
  lost: { marker: "x", paint: "lost" },
  failed: { marker: "x", paint: "lost" },
  granted: { marker: "triangle", paint: "live" },
  reconnected: { marker: "triangle", paint: "live" },
  finished: { marker: "circle", paint: "finished" },
};
let windowS = 30;
let isPaused = false;
const labelled = {};
let shown = [];
let shownEvents = [];

export function prepare() {
  onHover("timeline", "span", (data, i) => {
    const span = shown[data.index[i]];
    const pairs = [[span.isSum ? "in all" : "for", duration(span.end - span.start)], ["from", clock(span.start)]];
    if (span.waitedFor >= 0) pairs.unshift(["for partition", String(span.waitedFor)]);
    const activity = ACTIVITIES[span.activity] + (span.isSum ? ", many brief ones added up" : "");
    return { title: `Partition ${span.partition}: ${activity}`, swatch: color(`activity-${ACTIVITIES[span.activity]}`), pairs };
  });
  onHover("timeline", "event", (data, i) => {
    const [seconds, partition, what, host, attempt, text] = shownEvents[data.index[i]];
    const pairs = [["at", clock(seconds)], ["host", host], ["attempt", String(attempt)]];
    if (text) pairs.push(["", text]);
    return { title: `Partition ${partition} ${what}`, pairs };
  });
  onHover("shares", "share", (data, i, vars, name) => {
    const activity = name.replace("shares-", "");
    const partition = store.rows[data.row[i]];
    return {
      title: partition === undefined ? everybody() : `Partition ${partition}`,
      swatch: color(`activity-${activity}`),
      pairs: [[activity, percent(data.right[i] - data.left[i])], ["in all", duration(data.seconds[i])]],
    };
  });
  document.getElementById("activities").replaceChildren(...ACTIVITIES.map((name) => {
    const key = document.createElement("span");
    key.className = "key";
    const chip = document.createElement("i");
    chip.className = `chip activity-${name}`;
    key.append(chip, name);
    return key;
  }));
  onScheme(draw);
}

export function setWindow(seconds) {
  windowS = seconds;
  draw();
}

export function pause(on) {
  isPaused = on;
  if (!on) draw();
}

export function draw() {
  setRows();
  if (!isPaused) drawSpans();
  drawShares();
  summarize("timeline", describe());
}

function rowOf() {
  return new Map(store.rows.map((partition, row) => [partition, row]));
}

function setRows() {
  const { rows } = store;
  // One more row in the shares: all together.
  for (const [name, extra] of [["timeline", 0], ["shares", 1]]) {
    const plot = figure(name);
    const numRows = Math.max(rows.length, 4) + extra;
    const height = FRAME_PX + ROW_PX * Math.max(rows.length + extra, 4 + extra);
    if (plot.height !== height) {
      plot.height = height;
      document.getElementById(`plot-${name}`).style.minHeight = `${height}px`;
    }
    const [axis] = plot.left;
    const ticks = Array.from({ length: rows.length + extra }, (_, i) => i);
    if (axis.ticker.ticks.length !== ticks.length) axis.ticker.ticks = ticks;
    axis.formatter.doFormat = (some) => some.map((row) => labelOf(row, extra));
    axis.axis_label = name === "timeline" ? "partition" : null;
    const end = numRows - 0.5;
    if (plot.y_range.start !== end) plot.y_range.setv({ start: end, end: -0.5 });
    const labels = ticks.map((row) => labelOf(row, extra)).join();
    if (labelled[name] !== labels) {
      labelled[name] = labels;
      axis.change.emit();
    }
  }
}

function labelOf(row, extra) {
  const partition = store.rows[row];
  if (partition === undefined) return extra && row === store.rows.length ? "all" : "";
  return `${store.workers.get(partition)?.[1] === "lost" ? "✕ " : ""}${partition}`;
}

function drawSpans() {
  const now = store.state?.seconds ?? 0;
  const start = Math.max(now - windowS, 0);
  const since = now - windowS;
  const row = rowOf();
  shown = legible(store.spans.filter((span) => span.end > since && row.has(span.partition)));
  const columns = ACTIVITIES.map(() => ({ left: [], right: [], row: [], height: [], index: [] }));
  shown.forEach((span, index) => {
    const data = columns[span.activity];
    data.left.push(span.start);
    data.right.push(span.end);
    data.row.push(row.get(span.partition));
    // What stands for many brief ones is lower than what was seen as it is.
    data.height.push(span.isSum ? 0.44 : 0.72);
    data.index.push(index);
  });
  ACTIVITIES.forEach((name, i) => { source("timeline", `timeline-${name}`).data = columns[i]; });
  drawWaits(shown, row);
  drawEvents(since, row);
  figure("timeline").x_range.setv({ start, end: start + windowS });
  sayEmpty("timeline", store.rows.length ? "" : "No worker has come yet");
  sayEmpty("shares", store.rows.length ? "" : "No worker has come yet");
}

/** Those that are too brief to be told apart are added up, some pixels of them together, so that colours keep their share. */
function legible(spans) {
  const briefest = windowS / 250;
  const bin = windowS / 60;
  const sums = new Map();
  const shown = spans.filter((span) => {
    if (span.isSum || span.end - span.start >= briefest) return true;
    const key = `${span.partition} ${Math.floor(span.start / bin)}`;
    const sum = sums.get(key) ?? { partition: span.partition, start: span.start, seconds: ACTIVITIES.map(() => 0) };
    sum.seconds[span.activity] += span.end - span.start;
    sums.set(key, sum);
    return false;
  });
  for (const { partition, start, seconds } of sums.values()) {
    let at = start;
    seconds.forEach((duration, activity) => {
      if (duration) shown.push({ partition, activity, start: at, end: at + duration, isSum: true, waitedFor: -1 });
      at += duration;
    });
  }
  return shown;
}

/** A line from those who waited to the one that they waited for, at the moment when it came. */
function drawWaits(spans, row) {
  const lines = new Map();
  for (const span of spans) {
    if (span.waitedFor < 0 || !row.has(span.waitedFor) || span.end - span.start < windowS / 100) continue;
    const release = row.get(span.waitedFor);
    const own = row.get(span.partition);
    const key = `${Math.round((span.end / windowS) * 200)}-${release}`;
    const line = lines.get(key) ?? { x: span.end, y0: release, y1: release, release };
    line.x = Math.min(line.x, span.end);
    line.y0 = Math.min(line.y0, own);
    line.y1 = Math.max(line.y1, own);
    lines.set(key, line);
  }
  const all = [...lines.values()];
  source("timeline", "timeline-waits").data = {
    x: all.map((line) => line.x),
    y0: all.map((line) => line.y0),
    y1: all.map((line) => line.y1),
  };
  source("timeline", "timeline-releases").data = {
    x: all.map((line) => line.x),
    row: all.map((line) => line.release),
  };
}

function drawEvents(since, row) {
  shownEvents = store.events.filter(([seconds, partition, what]) => seconds > since && row.has(partition) && EVENTS[what]);
  source("timeline", "timeline-events").data = {
    x: shownEvents.map(([seconds]) => seconds),
    row: shownEvents.map(([, partition]) => row.get(partition)),
    marker: shownEvents.map(([, , what]) => EVENTS[what].marker),
    color: shownEvents.map(([, , what]) => color(EVENTS[what].paint)),
    index: shownEvents.map((_, i) => i),
  };
}

function drawShares() {
  const columns = ACTIVITIES.map(() => ({ left: [], right: [], row: [], height: [], seconds: [] }));
  const all = ACTIVITIES.map(() => 0);
  const add = (row, busy) => {
    const total = busy.reduce((a, b) => a + b, 0);
    let at = 0;
    busy.forEach((seconds, i) => {
      if (!total || !seconds) return;
      columns[i].left.push(at);
      at += seconds / total;
      columns[i].right.push(at);
      columns[i].row.push(row);
      columns[i].height.push(0.72);
      columns[i].seconds.push(seconds);
    });
  };
  store.rows.forEach((partition, row) => {
    const busy = store.workers.get(partition)?.at(-1) ?? [];
    busy.forEach((seconds, i) => { all[i] += seconds; });
    add(row, busy);
  });
  add(store.rows.length, all);
  ACTIVITIES.forEach((name, i) => { source("shares", `shares-${name}`).data = columns[i]; });
  const total = all.reduce((a, b) => a + b, 0);
  const parts = ACTIVITIES.map((name, i) => [name, all[i] / total]).filter(([, share]) => share > 0.004);
  summarize("shares", total ? `All: ${parts.map(([name, share]) => `${name} ${percent(share)}`).join(", ")}` : "");
}

function everybody() {
  return (store.state?.num_workers ?? 0) > store.rows.length ? "All that are shown" : "All partitions";
}

/** Who waits for whom at this moment, in words; and how many are not shown. */
function describe() {
  const { state, rows } = store;
  if (!state || !rows.length) return "";
  const parts = [];
  const { waiting, behind } = state;
  if (state.outcome === "running" && waiting.length) {
    const who = waiting.length === 1 ? `Partition ${waiting[0]} waits` : `Partitions ${listed(waiting)} wait`;
    const lost = behind.filter((partition) => store.workers.get(partition)?.[1] === "lost");
    const whom = behind.length === 1 ? `partition ${behind[0]}` : `partitions ${listed(behind)}`;
    parts.push(`${who}${behind.length ? ` for ${whom}` : ""}${lost.length ? `; lost: ${listed(lost)}` : ""}.`);
  } else if (state.outcome === "running") {
    parts.push("Nobody waits at this moment.");
  }
  const notShown = state.num_workers - rows.length;
  if (notShown > 0) {
    parts.push(`Shown are the lost, those that wait longest and the slowest; ${plural(notShown, "more partition")} ${notShown === 1 ? "is" : "are"} not.`);
  }
  parts.push("A line joins those who waited with the dot of the one they waited for; low bars add up many brief ones.");
  return parts.join(" ");
}
