// Brings the page to life: figures from a file that is the same for all runs, and frames by Bokeh's connection.

import * as keys from "./keys.js";
import * as plots from "./plots.js";
import * as series from "./series.js";
import { apply, store } from "./store.js";
import * as tables from "./tables.js";
import * as timeline from "./timeline.js";

const { token, assets, path } = document.body.dataset;
const notice = document.getElementById("connection");
let carrier = null;
let isHiddenWork = false;

async function begin() {
  keys.listen();
  const figures = await (await fetch(`${assets}figures.json`)).json();
  const items = [
    { docid: "figures", roots: figures.roots, root_ids: figures.root_ids },
    { token, roots: {}, root_ids: [] },
  ];
  // A figure without data yet is no reason for a warning.
  Bokeh.set_log_level("error");
  await Bokeh.embed.embed_items({ figures: figures.document }, items, path);
  const [drawing, session] = [
    Bokeh.documents.find((document) => document.get_model_by_name("timeline") !== null),
    Bokeh.documents.find((document) => document.get_model_by_name("carrier") !== null),
  ];
  plots.adopt(drawing);
  series.prepare();
  timeline.prepare();
  wire();
  if (!session) {
    lost("The page could not connect to the run’s server.");
    return;
  }
  session.on_event("connection_lost", () => lost("Not connected any more; this is the last state."));
  carrier = session.get_model_by_name("carrier");
  carrier.properties.frame.change.connect(receive);
  carrier.asked += 1;
}

function receive() {
  const text = carrier.frame;
  const frame = JSON.parse(text.slice(text.indexOf(" ") + 1));
  const isKnown = frame.full || store.run !== null;
  if (!isKnown) return;
  apply(frame);
  document.body.dataset.frames = text.slice(0, text.indexOf(" "));
  if (frame.full) series.setAxis(document.querySelector("input[name=axis]:checked").value);
  // A page that nobody sees is drawn when somebody looks at it again.
  if (document.hidden) isHiddenWork = true;
  else draw();
}

function draw() {
  isHiddenWork = false;
  tables.draw();
  if (!store.run) return;
  series.draw();
  timeline.draw();
}

function wire() {
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => series.setAxis(input.value));
  }
  for (const input of document.querySelectorAll("input[name=window]")) {
    input.addEventListener("change", () => timeline.setWindow(Number(input.value)));
  }
  document.getElementById("log").addEventListener("change", (event) => series.setLog(event.target.checked));
  document.getElementById("pause").addEventListener("click", (event) => {
    const on = event.target.getAttribute("aria-pressed") !== "true";
    event.target.setAttribute("aria-pressed", String(on));
    timeline.pause(on);
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && isHiddenWork) draw(); });
  document.getElementById("reconnect").addEventListener("click", reconnect);
}

function lost(text) {
  notice.hidden = false;
  notice.firstElementChild.textContent = text;
  document.body.classList.add("is-lost");
  tables.drawLost();
}

/** Loads the page anew where the server answers; else what is shown stays. */
async function reconnect() {
  try {
    if ((await fetch(`${assets}style.css`, { cache: "no-store" })).ok) {
      location.reload();
      return;
    }
  } catch {
    // As if it had refused.
  }
  notice.firstElementChild.textContent = "The server does not answer; this is the last state.";
}

begin().catch((error) => {
  lost(`The page could not be set up: ${error.message}`);
  throw error;
});
