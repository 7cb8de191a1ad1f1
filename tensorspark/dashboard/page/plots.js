// Bokeh's figures: found by name, dressed in the page's colours, with numbers written as everywhere on the page.

import { clock, si } from "./format.js";

export const ACTIVITIES = ["compute", "pull", "push", "wait", "evaluate", "standby"];

const models = new Map();
let colors = {};

/** Takes the figures of a Bokeh document. */
export function adopt(document) {
  for (const plot of document.roots()) {
    models.set(plot.name, plot);
    plot.below[0].formatter.doFormat = (ticks) => ticks.map((tick) => si(tick));
    plot.left[0].formatter.doFormat = (ticks) => ticks.map((tick) => si(tick));
    if (matchMedia("(pointer: fine)").matches) {
      plot.toolbar.active_drag = plot.toolbar.tools.find((tool) => tool.type === "BoxZoomTool");
    }
  }
  for (const element of window.document.querySelectorAll(".plot")) {
    // A picture with a name and, below it, in words: the keyboard has nothing to do within.
    const name = element.id.replace("plot-", "");
    element.setAttribute("role", "img");
    element.setAttribute("aria-labelledby", `${name}-title`);
    element.setAttribute("aria-describedby", `${name}-summary`);
    for (const inner of element.querySelectorAll("*")) inner.tabIndex = -1;
  }
  for (const name of ["throughput", "parallelism", "bytes", "timeline"]) timeAxis(name);
  figure("shares").below[0].formatter.doFormat = (ticks) => ticks.map((tick) => `${Math.round(tick * 100)}%`);
  figure("staleness").left[0].formatter.doFormat = (ticks) => ticks.map((tick) => `${Math.round(tick * 100)}%`);
  dress();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);
}

export function figure(name) {
  return models.get(name);
}

/** The source of that name in a figure. */
export function source(plotName, name) {
  for (const renderer of figure(plotName).renderers) {
    if (renderer.data_source.name === name) return renderer.data_source;
  }
  throw new Error(`no source ${name}`);
}

/** Ticks of an axis that shows seconds: whole minutes and hours, not hundreds of seconds. */
export function timeAxis(name) {
  const axis = figure(name).below[0];
  axis.ticker.setv({ base: 60, mantissas: [1, 2, 5, 10, 15, 30], desired_num_ticks: 6, num_minor_ticks: 0 });
  axis.formatter.doFormat = (ticks) => ticks.map(clock);
  axis.axis_label = "time";
}

/** Ticks of an axis that shows counts. */
export function countAxis(name, label) {
  const axis = figure(name).below[0];
  axis.ticker.setv({ base: 10, mantissas: [1, 2, 5], desired_num_ticks: 6, num_minor_ticks: 0 });
  axis.formatter.doFormat = (ticks) => ticks.map((tick) => si(tick));
  axis.axis_label = label;
}

/** A colour of the style sheet, such as `series-1`, in the scheme that the reader prefers now. */
export function color(name) {
  colors[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return colors[name];
}

/** What the pointer is over: `rows` gives, for a point of a source, a heading and pairs of words. */
export function onHover(plotName, toolName, rows) {
  const tool = figure(plotName).toolbar.tools.find((candidate) => candidate.name === toolName);
  tool.tooltips = (dataSource, vars) => tooltip(rows(dataSource.data, vars.index, vars, dataSource.name));
}

function tooltip({ title, swatch, pairs }) {
  const box = document.createElement("div");
  const font = getComputedStyle(document.body).fontFamily;
  box.style.cssText = `font:12px/1.5 ${font};color:${color("text")};padding:2px 4px;max-width:280px;overflow-wrap:anywhere`;
  const heading = document.createElement("div");
  heading.style.cssText = "font-weight:600;display:flex;gap:6px;align-items:center";
  if (swatch) {
    const chip = document.createElement("span");
    chip.style.cssText = `flex:none;width:10px;height:10px;border-radius:2px;background:${swatch}`;
    heading.append(chip);
  }
  heading.append(title);
  box.append(heading);
  const table = document.createElement("div");
  table.style.cssText = "display:grid;grid-template-columns:auto auto;column-gap:12px";
  for (const [name, value] of pairs) {
    const [left, right] = [document.createElement("span"), document.createElement("span")];
    left.textContent = name;
    left.style.color = color("muted");
    right.textContent = value;
    right.style.cssText = "text-align:right;font-variant-numeric:tabular-nums";
    table.append(left, right);
  }
  box.append(table);
  // Bokeh's own box around it is white in any scheme.
  queueMicrotask(() => {
    const { host } = box.getRootNode();
    host?.style.setProperty("background-color", color("card"));
    host?.style.setProperty("border-color", color("line"));
    host?.style.setProperty("border-radius", "6px");
  });
  return box;
}

// Bokeh draws on a canvas, which no style sheet reaches: its colours are set, again when the scheme changes.
function dress() {
  colors = {};
  const font = getComputedStyle(document.body).fontFamily;
  for (const plot of models.values()) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({
        axis_label_text_color: color("muted"),
        axis_label_text_font: font,
        axis_label_text_font_size: "12px",
        axis_label_standoff: 6,
        major_label_text_color: color("muted"),
        major_label_text_font: font,
        major_label_text_font_size: "12px",
      });
    }
    for (const grid of plot.center) grid.grid_line_color = grid.grid_line_color === null ? null : color("line");
    for (const renderer of plot.renderers) dressRenderer(renderer);
    for (const tool of plot.toolbar.tools) {
      tool.overlay?.setv?.({ fill_color: color("accent"), fill_alpha: 0.12, line_color: color("accent") });
    }
  }
  for (const listener of listeners) listener();
}

function dressRenderer(renderer) {
  const { glyph } = renderer;
  const [name] = glyph.tags;
  if (name) {
    const paint = { value: color(name) };
    for (const property of ["line_color", "fill_color"]) {
      if (property in glyph.attributes) glyph[property] = paint;
    }
    if (glyph.tags.includes("outlined")) glyph.line_color = { value: color("card") };
    if ("hatch_color" in glyph.attributes) glyph.hatch_color = { value: color("hatch") };
  }
}

const listeners = [];

/** Calls `listener` whenever the colours have changed: it draws what holds colours anew. */
export function onScheme(listener) {
  listeners.push(listener);
}

/** Says in the middle of a figure why it is empty; nothing to show what it has. */
export function sayEmpty(name, text) {
  const { dataset } = document.getElementById(`plot-${name}`);
  if (text) dataset.empty = text;
  else delete dataset.empty;
}

/** The figure in words, below it. */
export function summarize(name, text) {
  const element = document.getElementById(`${name}-summary`);
  if (element.textContent !== text) element.textContent = text;
}
