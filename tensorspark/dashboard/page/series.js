// Curves: loss and metrics, speed, weights, the network.

import { bytes, clock, count, metric, percent, si } from "./format.js";
import { color, countAxis, figure, onHover, onScheme, sayEmpty, source, summarize, timeAxis } from "./plots.js";
import { store } from "./store.js";

const NUM_COLORS = 8;
const MARKERS = ["circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star", "plus"];
const hidden = new Set();
let axis = "steps";
let isLog = false;
let variable = 0;

export function prepare() {
  for (const name of ["loss", "metrics"]) prepareCurves(name);
  const timed = (data, i, rows) => ({ title: clock(data.x[i]), pairs: rows });
  onHover("throughput", "pace", (data, i) =>
    timed(data, i, [["samples/s", si(data.samples_per_s[i])], ["steps/s", si(store.paces.steps_per_s[i])]]));
  onHover("parallelism", "pace", (data, i) =>
    timed(data, i, [["live", count(data.num_live[i])], ["waiting", count(data.num_waiting[i])]]));
  onHover("bytes", "pace", (data, i) => timed(data, i, [
    ["pulled", `${bytes(data.pulled_bytes_per_s[i])}/s`],
    ["pushed", `${bytes(data.pushed_bytes_per_s[i])}/s`],
  ]));
  figure("bytes").left[0].formatter.doFormat = (ticks) => ticks.map((tick) => bytes(tick));
  onHover("staleness", "staleness", (data, i) => ({
    title: behind(data.bin[i]),
    pairs: [["pushes", count(data.count[i])], ["share", percent(data.share[i])]],
  }));
  figure("staleness").below[0].ticker.setv({ mantissas: [1, 2, 5], min_interval: 1, num_minor_ticks: 0 });
  figure("staleness").below[0].formatter.doFormat = (ticks) => ticks.map((tick) => (isLastBin(tick) ? `${tick}+` : `${tick}`));
  for (const name of ["weight-norm", "update-norm"]) {
    onHover(name, "norm", (data, i) => ({
      title: metric(data.y[i]),
      pairs: [["step", count(data.steps[i])], ["time", clock(data.seconds[i])]],
    }));
  }
  for (const name of ["values", "updates"]) {
    onHover(name, "bin", (data, i) => ({
      title: `${si(data.left[i])} … ${si(data.right[i])}`,
      pairs: [["values", count(data.top[i])]],
    }));
  }
  document.getElementById("variable").addEventListener("change", (event) => {
    variable = Number(event.target.value);
    drawWeights(true);
  });
  onScheme(() => { drawCurves(); });
}

function prepareCurves(name) {
  const value = (y) => (name === "loss" && isLog ? 10 ** y : y);
  figure(name).left[0].formatter.doFormat = (ticks) =>
    ticks.map((tick) => (name === "loss" && isLog ? si(10 ** tick, 2) : si(tick)));
  onHover(name, "training", (data, i, vars) => ({
    title: data.label[i],
    swatch: data.color[i],
    pairs: [
      ["value", metric(value(data.ys[i][vars.segment_index]))],
      ["step", count(data.steps[i][vars.segment_index])],
      ["time", clock(data.seconds[i][vars.segment_index])],
    ],
  }));
  onHover(name, "epoch", (data, i) => ({
    title: `${data.label[i]}, epoch ${data.epoch[i]}`,
    swatch: data.color[i],
    pairs: [["value", metric(value(data.y[i]))], ["step", count(data.steps[i])], ["time", clock(data.seconds[i])]],
  }));
}

export function setAxis(name) {
  axis = name;
  for (const plot of ["loss", "metrics", "weight-norm", "update-norm"]) {
    if (axis === "seconds") timeAxis(plot);
    else countAxis(plot, "steps of all workers");
  }
  drawCurves();
  drawWeights(true);
}

export function setLog(on) {
  isLog = on;
  const { ticker } = figure("loss").left[0];
  if (on) ticker.get_ticks = logTicks;
  else delete ticker.get_ticks;
  drawCurves();
}

/** Ticks at 1, 2, 5, 10, …, of which the axis holds the logarithms; fewer where there is much between its ends. */
function logTicks(low, high) {
  const mantissas = high - low > 3 ? [1] : high - low > 1.6 ? [1, 3] : [1, 2, 5];
  const major = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const mantissa of mantissas) {
      const tick = power + Math.log10(mantissa);
      if (tick >= low && tick <= high) major.push(tick);
    }
  }
  return { major, minor: [] };
}

export function draw() {
  drawCurves();
  drawPaces();
  drawStaleness();
  drawWeights(false);
}

function isLoss(name) {
  return /loss|objective|cost|error|mse|mae|entropy|perplexity/i.test(name);
}

/** Whose curves go where: what is called a loss, or the first there is, and the others. */
function divided() {
  const logs = new Set(store.epochs.flatMap((epoch) => Object.keys(epoch.logs)));
  const names = [...new Set([...Object.keys(store.points.scalars), ...[...logs].map((name) => name.replace(/^val_/, ""))])];
  const losses = names.filter(isLoss);
  const chosen = new Set(losses.length ? losses : names.slice(0, 1));
  return { loss: names.filter((name) => chosen.has(name)), metrics: names.filter((name) => !chosen.has(name)) };
}

function drawCurves() {
  const groups = divided();
  drawGroup("loss", groups.loss);
  drawGroup("metrics", groups.metrics);
  document.getElementById("metrics-card").hidden = store.points.seconds.length > 0 && !groups.metrics.length;
}

function drawGroup(name, labels) {
  const scaled = (y) => (y === null ? NaN : name === "loss" && isLog ? (y > 0 ? Math.log10(y) : NaN) : y);
  const { points } = store;
  const curves = { xs: [], ys: [], color: [], alpha: [], label: [], seconds: [], steps: [] };
  const dashes = { xs: [], ys: [], color: [], label: [] };
  const dots = { x: [], y: [], color: [], marker: [], label: [], epoch: [], seconds: [], steps: [] };
  const legend = [];
  labels.forEach((label, index) => {
    const paint = `series-${(index % NUM_COLORS) + 1}`;
    if (points.scalars[label]?.some((value) => value !== null)) {
      legend.push({ label, paint, kind: "line" });
      if (!hidden.has(label)) {
        curves.xs.push(points[axis]);
        curves.ys.push(points.scalars[label].map(scaled));
        curves.color.push(color(paint));
        curves.alpha.push(1);
        curves.label.push(label);
        curves.seconds.push(points.seconds);
        curves.steps.push(points.steps);
      }
    }
    drawEpochs(`val_${label}`, `series-${((index + 1) % NUM_COLORS) + 1}`, index, scaled, dashes, dots, legend);
  });
  source(name, `${name}-training`).data = curves;
  source(name, `${name}-epochs`).data = dashes;
  source(name, `${name}-dots`).data = dots;
  drawLegend(name, legend);
  sayEmpty(name, legend.length ? "" : name === "loss" ? "No training step has been reported yet" : "No metrics yet");
  summarize(name, describe(labels));
}

function drawEpochs(label, paint, index, scaled, dashes, dots, legend) {
  const epochs = store.epochs.filter((epoch) => (epoch.logs[label] ?? null) !== null);
  if (!epochs.length) return;
  legend.push({ label, paint, kind: "dash" });
  if (hidden.has(label)) return;
  const xs = epochs.map((epoch) => epoch[axis]);
  const ys = epochs.map((epoch) => scaled(epoch.logs[label]));
  dashes.xs.push(xs);
  dashes.ys.push(ys);
  dashes.color.push(color(paint));
  dashes.label.push(label);
  epochs.forEach((epoch, i) => {
    dots.x.push(xs[i]);
    dots.y.push(ys[i]);
    dots.color.push(color(paint));
    dots.marker.push(MARKERS[index % MARKERS.length]);
    dots.label.push(label);
    dots.epoch.push(epoch.epoch);
    dots.seconds.push(epoch.seconds);
    dots.steps.push(epoch.steps);
  });
}

/** A button a curve, which hides and shows it. */
function drawLegend(name, items) {
  const legend = document.getElementById(`${name}-legend`);
  const key = JSON.stringify(items);
  if (legend.dataset.key === key) return;
  legend.dataset.key = key;
  legend.replaceChildren(...items.map(({ label, paint, kind }) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "key";
    button.setAttribute("aria-pressed", String(!hidden.has(label)));
    button.title = "Hide or show this curve";
    const line = document.createElement("i");
    line.className = `${kind} ${paint}`;
    button.append(line, label);
    button.addEventListener("click", () => {
      if (!hidden.delete(label)) hidden.add(label);
      button.setAttribute("aria-pressed", String(!hidden.has(label)));
      drawCurves();
    });
    return button;
  }));
}

function describe(labels) {
  const parts = [];
  for (const label of labels) {
    const values = store.points.scalars[label] ?? [];
    let last = values.length - 1;
    while (last >= 0 && values[last] === null) last -= 1;
    if (last >= 0) parts.push(`${label} ${metric(values[last])}${range(label, values)}`);
    const epochs = store.epochs.filter((epoch) => (epoch.logs[`val_${label}`] ?? null) !== null);
    if (epochs.length) parts.push(`val_${label} ${metric(epochs.at(-1).logs[`val_${label}`])}`);
  }
  return parts.length ? `Now: ${parts.join(" · ")}` : "";
}

function range(label, values) {
  if (!isLoss(label)) return "";
  let best = 0;
  values.forEach((value, i) => { if (value !== null && (values[best] === null || value < values[best])) best = i; });
  return ` (lowest ${metric(values[best])} at step ${count(store.points.steps[best])})`;
}

function drawPaces() {
  const { paces, state } = store;
  const x = paces.seconds ?? [];
  const columns = (...names) => Object.fromEntries([["x", x], ...names.map((name) => [name, paces[name] ?? []])]);
  source("throughput", "throughput-paces").data = columns("samples_per_s");
  source("parallelism", "parallelism-paces").data = columns("num_live", "num_waiting");
  source("bytes", "bytes-paces").data = columns("pulled_bytes_per_s", "pushed_bytes_per_s");
  for (const name of ["throughput", "parallelism", "bytes"]) sayEmpty(name, x.length ? "" : "Nothing measured yet");
  if (!state) return;
  const rates = (paces.samples_per_s ?? []).filter((value) => value !== null);
  const most = rates.reduce((a, b) => Math.max(a, b), 0);
  const mean = state.seconds > 0 ? (state.num_samples ?? 0) / state.seconds : null;
  summarize("throughput", x.length
    ? `${state.outcome === "running" ? `Now ${si(state.samples_per_s)}, on` : "On"} average ${si(mean)}, at most ${si(most)}` : "");
  summarize("parallelism", x.length ? `Now ${count(state.num_live)} live, ${count(state.num_waiting)} of them waiting` : "");
  summarize("bytes", x.length
    ? `In all ${bytes(state.num_bytes_pulled)} pulled and ${bytes(state.num_bytes_pushed)} pushed` : "");
}

function isLastBin(bin) {
  const bins = store.state?.staleness ?? [];
  return bins.length > 1 && bin === bins.length - 1;
}

function behind(bin) {
  if (isLastBin(bin)) return `${bin} or more versions behind`;
  return bin === 1 ? "1 version behind" : bin === 0 ? "up to date" : `${bin} versions behind`;
}

function drawStaleness() {
  const bins = store.state?.staleness ?? [];
  const total = bins.reduce((a, b) => a + b, 0);
  let last = bins.length - 1;
  while (last > 3 && !bins[last]) last -= 1;
  const shown = total ? bins.slice(0, last + 1) : [];
  const shares = shown.map((value) => value / total);
  source("staleness", "staleness-bars").data = { bin: shown.map((_, i) => i), share: shares, count: shown };
  figure("staleness").x_range.setv({ start: -0.6, end: Math.max(shown.length, 4) - 0.4 });
  sayEmpty("staleness", total ? "" : "No push has been merged yet");
  const mean = bins.reduce((sum, value, i) => sum + value * i, 0) / total;
  summarize("staleness", total ? `${percent(bins[0] / total)} up to date; ${si(mean, 2)} versions behind on average` : "");
}

let drawnWeights = null;
let drawnNorms = null;

function drawWeights(force) {
  const names = (store.run?.tensors ?? []).map(([name]) => name);
  chooseVariable(names);
  if (!force && drawnWeights === store.weights && drawnNorms === store.norms.seconds) return;
  drawnWeights = store.weights;
  drawnNorms = store.norms.seconds;
  const { norms } = store;
  const tensor = store.weights?.tensors[variable];
  for (const [plot, kind] of [["weight-norm", "weights"], ["update-norm", "updates"]]) {
    const y = (norms[kind][variable] ?? []).map((value) => value ?? NaN);
    source(plot, `${plot}-line`).data = { x: y.length ? norms[axis] : [], y, steps: norms.steps, seconds: norms.seconds };
    const some = y.some((value) => !Number.isNaN(value));
    sayEmpty(plot, some ? "" : "Not measured yet");
    const last = kind === "weights" ? tensor?.norm : tensor?.update_norm;
    summarize(plot, some ? `Now ${metric(last)}` : "");
  }
  drawHistogram("values", tensor?.edges ?? [], tensor?.counts ?? []);
  drawHistogram("updates", tensor?.update_edges ?? [], tensor?.update_counts ?? []);
}

function drawHistogram(name, edges, counts) {
  source(name, `${name}-bins`).data = { left: edges.slice(0, -1), right: edges.slice(1), top: counts };
  sayEmpty(name, counts.length ? "" : "Not measured yet");
  const total = counts.reduce((a, b) => a + b, 0);
  summarize(name, counts.length ? `${count(total)} values from ${si(edges[0])} to ${si(edges.at(-1))}` : "");
}

function chooseVariable(names) {
  const select = document.getElementById("variable");
  const key = JSON.stringify(names);
  if (select.dataset.key !== key) {
    select.dataset.key = key;
    variable = 0;
    select.replaceChildren(...names.map((name, i) => new Option(name, String(i))));
  }
  const [, shape, type] = store.run?.tensors[variable] ?? [];
  const more = (store.run?.num_tensors ?? 0) - names.length;
  document.getElementById("variable-shape").textContent = shape
    ? `${shape.length ? shape.join(" × ") : "scalar"} · ${type}${more > 0 ? ` · ${more} more variables are not shown` : ""} · version ${count(store.weights?.version)}` : "";
}
