// What is words and numbers: the head of the page, and its tables. All text goes in as text, never as HTML.

import { bytes, clock, count, duration, metric, percent, plural, si } from "./format.js";
import { store } from "./store.js";

const SYMBOLS = { pending: "○", live: "●", waiting: "◐", lost: "✕", finished: "✓" };
const OUTCOMES = { running: "● running", finished: "✓ finished", stopped: "■ stopped", failed: "✕ failed" };
const LEVELS = { 30: "warning", 40: "error", 50: "critical" };
const WORKER = ["partition", "state", "host", "attempt", "attempts", "steps", "samples", "lag", "pushed", "pulled",
  "progress", "applied", "refused", "reconnects"];
const HEADS = {
  "worker-table": ["Partition", "State", "Host", "#Attempts", "#Progress", "#Steps", "#Samples", "#Lag", "#Pushed",
    "#Pulled", "#Refused"],
  "checkpoint-table": ["#Version", "Written at", "#Size", "#Took", "Where"],
  "event-table": ["At", "#Partition", "What", "Host", "#Attempt", "Text"],
  "log-table": ["At", "#Partition", "Host", "Level", "Message"],
  "settings-table": ["Name", "Value"],
  "tensor-table": ["Name", "#Shape", "Type"],
};
let said = "";

const $ = (id) => document.getElementById(id);

/** Sets an element's text, where it is another: what does not change is not touched. */
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function draw() {
  $("nothing").hidden = store.run !== null;
  $("main").hidden = store.run === null;
  drawBar();
  if (!store.run || !store.state) return;
  drawFacts();
  drawEpochs();
  drawWorkers();
  drawLists();
  drawCompression();
  drawConfiguration();
}

function drawBar() {
  const { run, state } = store;
  put($("name"), run?.name || "tensorspark");
  document.title = run ? `${progressOf(state)}${run.name} · tensorspark` : "tensorspark";
  $("mode").hidden = !run;
  put($("mode"), run?.mode ?? "");
  const outcome = run ? state?.outcome ?? "running" : "none";
  $("state").dataset.state = outcome;
  put($("state"), run ? OUTCOMES[outcome] ?? outcome : "○ waiting for a run");
  $("failure").hidden = !state?.message;
  put($("failure"), state?.message ? `${outcome === "failed" ? "The run failed" : "The run ended"}: ${state.message}` : "");
  put($("bar-steps"), state ? `${si(state.num_steps ?? 0)} steps · ${rate(state)}` : "");
  put($("bar-workers"), state ? alive(state) : "");
  const progress = $("progress");
  const share = outcome === "finished" ? 1 : state?.progress ?? null;
  progress.firstElementChild.style.width = `${(share ?? 0) * 100}%`;
  progress.dataset.state = outcome;
  if (share === null) progress.removeAttribute("aria-valuenow");
  else progress.setAttribute("aria-valuenow", String(Math.round(share * 100)));
  announce(run, outcome, state);
}

/** The server is gone: what was running then may be over by now. */
export function drawLost() {
  if (store.run && store.state?.outcome === "running") put($("state"), "○ last seen running");
}

function progressOf(state) {
  if (!state || state.outcome !== "running") return "";
  return state.progress === null || state.progress === undefined ? "" : `${percent(state.progress)} `;
}

function rate(state) {
  return state.outcome === "running" ? `${si(state.samples_per_s)} samples/s` : `in ${clock(state.seconds)}`;
}

function alive(state) {
  return `${count(state.num_live ?? 0)} live${state.num_lost ? ` · ✕ ${count(state.num_lost)} lost` : ""}`;
}

/** For who listens to the page: what changes seldom, and matters. */
function announce(run, outcome, state) {
  const text = !run ? "" : `${run.name} ${outcome}${state?.num_lost ? `, ${plural(state.num_lost, "worker")} lost` : ""}`;
  if (text !== said) put($("announcements"), text);
  said = text;
}

function drawFacts() {
  const { run, state } = store;
  const epochs = run.num_epochs > 1 && state.epoch !== null && state.epoch !== undefined;
  pairs($("facts"), [
    ["Progress", state.outcome === "finished" ? "100%" : percent(state.progress)],
    ["Elapsed", clock(state.seconds)],
    [state.outcome === "running" ? "Left, about" : "Ended", state.outcome === "running" ? clock(state.eta_s) : state.outcome],
    ["Steps", count(state.num_steps)],
    ["Samples", si(state.num_samples)],
    ["Samples/s", state.outcome === "running" ? si(state.samples_per_s) : `⌀ ${si(state.num_samples / state.seconds)}`],
    [epochs ? "Epoch" : "Epochs", epochs ? `${state.epoch} of ${run.num_epochs}` : count(run.num_epochs)],
    ["Live", `${count(state.num_live)} / ${count(run.num_partitions)}`],
    ["Lost", count(state.num_lost), state.num_lost ? "lost" : ""],
  ]);
}

function pairs(list, items) {
  if (list.children.length !== items.length) {
    list.replaceChildren(...items.map(() => {
      const group = document.createElement("div");
      group.append(document.createElement("dt"), document.createElement("dd"));
      return group;
    }));
  }
  items.forEach(([name, value, kind], i) => {
    const [term, description] = list.children[i].children;
    put(term, name);
    if (value instanceof Node) {
      if (description.textContent !== value.textContent) description.replaceChildren(value);
    } else {
      put(description, value);
    }
    description.className = kind ?? "";
  });
}

/** Fills a table: rows that are there are kept, cells that stay as they are are not touched. */
function table(id, rows, { heads = HEADS[id], empty = "None" } = {}) {
  const [head, body] = [$(id).tHead, $(id).tBodies[0]];
  const key = heads.join("|");
  if (head.dataset.key !== key) {
    head.dataset.key = key;
    const row = document.createElement("tr");
    row.append(...heads.map((text) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text.replace("#", "");
      cell.className = text.startsWith("#") ? "number" : "";
      return cell;
    }));
    head.replaceChildren(row);
    body.replaceChildren();
  }
  if (!rows.length) {
    const row = document.createElement("tr");
    const cell = row.insertCell();
    cell.colSpan = heads.length;
    cell.className = "empty";
    cell.textContent = empty;
    body.replaceChildren(row);
    return;
  }
  if (body.querySelector(".empty")) body.replaceChildren();
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((values, i) => fill(body.rows[i] ?? body.insertRow(), values, heads));
}

function fill(row, { cells, kind = "" }, heads) {
  if (row.className !== kind) row.className = kind;
  cells.forEach((value, i) => {
    const cell = row.cells[i] ?? row.insertCell();
    const className = heads[i].startsWith("#") ? "number" : value?.className ?? "";
    if (cell.className !== className) cell.className = className;
    put(cell, value?.text ?? String(value ?? ""));
  });
}

function drawEpochs() {
  const { epochs, run } = store;
  const names = [...new Set(epochs.flatMap((epoch) => Object.keys(epoch.logs)))];
  $("epochs-card").hidden = !epochs.length;
  put($("epochs-count"), epochs.length ? `${epochs.length} of ${run.num_epochs}` : "");
  if (!epochs.length) return;
  const rows = epochs.map((epoch) => ({
    cells: [epoch.epoch, clock(epoch.seconds), count(epoch.steps), ...names.map((name) => metric(epoch.logs[name]))],
  }));
  table("epochs", rows.reverse(), { heads: ["#Epoch", "#Ended at", "#Steps", ...names.map((name) => `#${name}`)] });
}

function drawWorkers() {
  const { state, run, workers, table: chosen } = store;
  const rows = chosen.filter((partition) => workers.has(partition)).map((partition) => {
    const worker = Object.fromEntries(workers.get(partition).map((value, i) => [WORKER[i], value]));
    return {
      kind: `is-${worker.state}`,
      cells: [
        String(worker.partition),
        { text: `${SYMBOLS[worker.state] ?? "?"} ${worker.state}`, className: "worker-state" },
        worker.host || "–",
        count(worker.attempts),
        percent(worker.progress),
        count(worker.steps),
        si(worker.samples),
        count(worker.lag),
        bytes(worker.pushed),
        bytes(worker.pulled),
        count(worker.refused),
      ],
    };
  });
  table("worker-table", rows, { empty: "No worker has come yet" });
  const parts = [plural(run.num_partitions, "partition")];
  for (const [name, word] of [["num_live", "live"], ["num_waiting", "of them waiting"], ["num_lost", "lost"],
    ["num_standby", "standing by"], ["num_finished", "finished"]]) {
    if (state[name]) parts.push(`${count(state[name])} ${word}`);
  }
  put($("workers-count"), parts.join(" · "));
  const notShown = state.num_workers - rows.length;
  $("workers-note").hidden = notShown <= 0;
  put($("workers-note"), `${plural(notShown, "more partition")} not shown.`);
}

function drawLists() {
  const { checkpoints, events, logs } = store;
  table("checkpoint-table", checkpoints.map(([seconds, version, url, size, took]) => ({
    cells: [count(version), clock(seconds), bytes(size), duration(took), { text: url, className: "path" }],
  })).reverse(), { empty: "None written yet" });
  put($("checkpoints-count"), checkpoints.length ? String(checkpoints.length) : "");
  table("event-table", events.slice(-200).map(([seconds, partition, what, host, attempt, text]) => ({
    kind: what === "lost" || what === "failed" ? "is-lost" : "",
    cells: [clock(seconds), partition, what, host, attempt, { text, className: "long" }],
  })).reverse(), { empty: "Nothing yet" });
  table("log-table", logs.slice(-200).map(([seconds, partition, host, level, logger, message]) => ({
    kind: level >= 40 ? "is-lost" : "",
    cells: [clock(seconds), partition, host, LEVELS[level] ?? level, { text: `${logger}: ${message}`, className: "long" }],
  })).reverse(), { empty: "No warnings" });
  put($("events-count"), logs.length ? plural(logs.length, "warning") : "");
}

function drawCompression() {
  const { state } = store;
  const [wire, raw] = ["num_bytes", "num_raw_bytes"].map((name) => (state[`${name}_pushed`] ?? 0) + (state[`${name}_pulled`] ?? 0));
  const ratio = (r, w) => (w ? `${si(r / w)} ×` : "–");
  pairs($("compression"), [
    ["Ratio, both ways", ratio(raw, wire)],
    ["Pushes", ratio(state.num_raw_bytes_pushed, state.num_bytes_pushed)],
    ["Pulls", ratio(state.num_raw_bytes_pulled, state.num_bytes_pulled)],
    ["On the wire", bytes(wire)],
    ["As plain weights", bytes(raw)],
    ["Saved", wire && raw ? percent(Math.max(1 - wire / raw, 0)) : "–"],
  ]);
}

function drawConfiguration() {
  const { run } = store;
  const key = JSON.stringify([run.name, run.run, run.started_at]);
  if ($("configuration").dataset.key === key) return;
  $("configuration").dataset.key = key;
  const about = [
    ["Name", run.name],
    ["Run", String(run.run)],
    ["Began", new Date(run.started_at * 1000).toLocaleString()],
    ["Mode", run.mode],
    ["Weight combiner", run.combiner],
    ["Partitions", count(run.num_partitions)],
    ["Epochs", count(run.num_epochs)],
    ["Model", `${bytes(run.model_bytes)} in ${plural(run.num_tensors, "variable")}`],
    ["tensorspark", run.tensorspark_version],
  ];
  if (run.resumed_steps) about.push(["Resumed after", plural(run.resumed_steps, "step")]);
  if (run.app_id) about.push(["Spark application", run.app_id]);
  if (run.job_group) about.push(["Spark job group", run.job_group]);
  if (run.spark_url) about.push(["Spark’s page", link(run.spark_url)]);
  pairs($("about"), about);
  table("settings-table", run.settings.map(([name, value]) => ({ cells: [{ text: name, className: "path" }, { text: value, className: "path" }] })));
  table("tensor-table", run.tensors.map(([name, shape, type]) => ({
    cells: [{ text: name, className: "path" }, shape.join(" × ") || "scalar", type],
  })));
  put($("tensors-count"), count(run.num_tensors));
  put($("foot"), `tensorspark ${run.tensorspark_version}`);
}

function link(url) {
  // Only what is a web address becomes a link.
  if (!/^https?:\/\//i.test(url)) return document.createTextNode(url);
  const anchor = document.createElement("a");
  anchor.href = url;
  anchor.textContent = url;
  anchor.rel = "noreferrer noopener";
  anchor.target = "_blank";
  return anchor;
}
