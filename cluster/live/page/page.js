// Asks the gateway every second how it is, and shows it.
import { drawChart, svg } from "./charts.js";

const INTERVAL_MS = 1000, HIDDEN_INTERVAL_MS = 5000, WARM_S = 6;
const $ = (selector) => document.querySelector(selector);
const still = matchMedia("(prefers-reduced-motion: reduce)");
let lastHandoff = null, started = null;

function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const nameOf = (engine) => (engine || "").split(".")[0];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.0009995) return `${Math.round(value * 1e6)} µs`;
  if (value < 0.00995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1e3)} ms`;
  return value < 9.95 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (value >= 999.5 && i < 4) { value /= 1000; i += 1; }
  return `${i && value < 9.95 ? value.toFixed(1) : Math.round(value)} ${units[i]}`;
}
const number = (value) => (value >= 1e4 ? `${(value / 1e3).toFixed(value < 1e5 ? 1 : 0)}k` : value >= 99.5 ? `${Math.round(value)}` : value >= 9.95 ? value.toFixed(0) : value.toFixed(value ? 1 : 0));
const percent = (value) => (value === null || value === undefined ? "–" : `${Math.round(value * 100)} %`);
function duration(value) {
  const [d, h, m] = [Math.floor(value / 86400), Math.floor(value / 3600) % 24, Math.floor(value / 60) % 60];
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.floor(value)} s`;
}

function showTiles(live) {
  const { lately, objectives, states } = live;
  const [whole, unit] = seconds(lately.ttft_p50_s).split(" ");
  const [gap, gapUnit] = seconds(lately.tpot_p50_s).split(" ");
  const [moved, movedUnit] = bytes(lately.kv_bytes_per_s).split(" ");
  const under = ["prefill", "handoff", "decode"].filter((state) => states[state]).map((state) => `${states[state]} ${state}`);
  const tiles = [
    ["Requests", number(lately.requests_per_s), "/s", `${number(live.totals.finished)} in all`],
    ["Good", percent(lately.good_share), "", `≤ ${seconds(objectives.ttft_s)}, ≤ ${seconds(objectives.tpot_s)}`],
    ["First token", whole, unit, `90 %: ${seconds(lately.ttft_p90_s)}`],
    ["Between tokens", gap, gapUnit, "median"],
    ["Tokens", number(lately.tokens_per_s), "/s", `${number(live.totals.tokens)} in all`],
    ["KV cache moved", moved, `${movedUnit}/s`, `${bytes(live.totals.kv_bytes)} in all`],
    ["Under way", `${live.running}`, "", under.join(", ") || "nothing"],
    ["Waiting", `${live.queued}`, "", live.queued ? "for room on the workers" : "nobody"],
  ];
  $("#tiles").replaceChildren(...tiles.map(([name, value, small, note]) =>
    element("div", "tile", element("span", "", name), element("b", "", value, element("small", "", small || "")), element("em", "", note))));
}

function showPool(role, live) {
  const workers = live.workers.filter((worker) => worker.role === role);
  const pools = live.pools.filter((pool) => pool.role === role);
  const ready = workers.filter((worker) => worker.state === "ready").length;
  const target = pools.reduce((sum, pool) => sum + pool.target, 0);
  const groups = pools.filter((pool) => pool.group).map((pool) => `${pool.group} ${pool.target}`).join(", ");
  $(`#${role} h2 small`).textContent = `${ready} of ${target} ready${groups ? ` (${groups})` : ""}${target !== workers.length ? `, ${workers.length} here` : ""}`;
  $(`#${role} .workers`).replaceChildren(...(workers.length ? workers.map((worker) => workerCard(worker)) : [element("p", "empty", "no workers")]));
}

function workerCard(worker) {
  const { load } = worker, total = Math.max(1, load.total_blocks);
  const taken = load.total_blocks - load.free_blocks - load.reserved_blocks - load.quarantined_blocks;
  const bar = element("div", "bar");
  bar.title = `${load.total_blocks - load.free_blocks} of ${load.total_blocks} KV blocks, ${load.reserved_blocks} of them held for handoffs, ${load.quarantined_blocks} quarantined`;
  for (const [name, count] of [["used", taken], ["held", load.reserved_blocks], ["quarantined", load.quarantined_blocks]]) {
    const part = element("i", name);
    part.style.width = `${(100 * Math.max(0, count)) / total}%`;
    bar.append(part);
  }
  const pair = (label, value) => element("span", "", element("b", "", `${value}`), ` ${label}`);
  const numbers = element("div", "numbers", pair("running", load.running), pair("waiting", load.waiting),
    load.preempted ? pair("swapped", load.preempted) : null, load.quarantined_blocks ? pair("quarantined", load.quarantined_blocks) : null,
    pair("KV", percent((load.total_blocks - load.free_blocks) / total)));
  const meta = worker.device ? `${worker.device} · ${worker.backend}${worker.group ? ` · ${worker.group}` : ""}` : "loading";
  const silent = worker.silent_s !== null && worker.silent_s > 2.5 ? ` · silent for ${seconds(worker.silent_s)}` : "";
  const card = element("div", `worker ${worker.state}`,
    element("div", "top", element("b", "", worker.name), element("span", `state ${worker.state}`, worker.state)),
    element("div", "meta", meta + silent), numbers, bar);
  card.dataset.worker = worker.name;
  if (worker.unreachable.length) card.title = worker.unreachable.join("\n");
  return card;
}

function showHandoffs(live) {
  const recent = [...live.handoffs].reverse();
  $(".middle h2 small").textContent = `${live.totals.handoffs} since the start`;
  $("#handoffs").replaceChildren(...recent.slice(0, 6).map((one) => {
    const hidden = one.transfer_s > 0 ? Math.max(0, 1 - one.exposed_s / one.transfer_s) : 1;
    const item = element("li", "", element("span", "", `${nameOf(one.prefill)} → ${nameOf(one.decode)}`), element("span", "faint", `${bytes(one.bytes)} · ${seconds(one.transfer_s)} · ${percent(hidden)} hidden`));
    item.title = one.id;
    item.style.setProperty("--age", Math.max(0.15, 1 - (live.now - one.at) / 20));
    return item;
  }));
  drawWires(live, recent);
}

function drawWires(live, recent) {
  const wires = $("#wires"), box = wires.getBoundingClientRect();
  if (!box.width) return;
  const warm = new Set(recent.filter((one) => live.now - one.at < WARM_S).map((one) => `${nameOf(one.prefill)}>${nameOf(one.decode)}`));
  const place = (role, name, x) => {
    const card = [...document.querySelectorAll(`#${role} .worker`)].find((one) => one.dataset.worker === name);
    if (!card) return null;
    const at = card.getBoundingClientRect();
    return [x, at.top + at.height / 2 - box.top];
  };
  const pairs = live.links.length <= 64 ? live.links.map((link) => [nameOf(link.prefill), nameOf(link.decode)]) : [...warm].map((pair) => pair.split(">"));
  const moving = [...wires.querySelectorAll("circle")];
  const paths = new Map();
  for (const [prefill, decode] of pairs) {
    const from = place("prefill", prefill, 0), to = place("decode", decode, box.width);
    if (!from || !to) continue;
    const middle = box.width / 2;
    const d = `M${from[0]},${from[1]}C${middle},${from[1]} ${middle},${to[1]} ${to[0]},${to[1]}`;
    paths.set(`${prefill}>${decode}`, svg("path", { d, class: warm.has(`${prefill}>${decode}`) ? "warm" : "" }));
  }
  wires.replaceChildren(...paths.values(), ...moving);
  const fresh = lastHandoff === null ? [] : recent.filter((one) => one.number > lastHandoff).slice(0, 24);
  lastHandoff = recent.length ? Math.max(lastHandoff ?? 0, recent[0].number) : (lastHandoff ?? 0);
  if (still.matches) return;
  fresh.forEach((one, i) => {
    const path = paths.get(`${nameOf(one.prefill)}>${nameOf(one.decode)}`);
    if (path) setTimeout(() => runAlong(wires, path, one.bytes), (i * 900) / fresh.length);
  });
}

// A dot as large as what was moved runs from worker to worker.
function runAlong(wires, path, size) {
  const dot = svg("circle", { r: Math.min(7, 2 + Math.log10(1 + size / 1e4)) });
  const length = path.getTotalLength(), began = performance.now();
  wires.append(dot);
  const step = (now) => {
    const share = (now - began) / 700;
    if (share >= 1) return dot.remove();
    const at = path.getPointAtLength(length * (share < 0.5 ? 2 * share * share : 1 - 2 * (1 - share) ** 2));
    dot.setAttribute("cx", at.x);
    dot.setAttribute("cy", at.y);
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

function showCharts(live) {
  const s = live.series, step_s = s.step_s;
  const charts = [
    ["#chart-ttft", [["median", s.ttft_p50_s, "p", true], ["90 %", s.ttft_p90_s, "h"]], { format: seconds, goal: live.objectives.ttft_s }],
    ["#chart-good", [["good", s.good, "good", true], ["arriving", s.arrived, "q"], ...(s.failed.some(Boolean) ? [["failed", s.failed, "bad"]] : [])], { format: (v) => `${number(v)}/s`, least: 1 }],
    ["#chart-kv", [["prefill", s.kv_prefill, "p"], ["decode", s.kv_decode, "d", true]], { format: percent, most: 1 }],
    ["#chart-queue", [["waiting", s.queued, "h", true]], { format: (v) => (Number.isInteger(v) ? `${v}` : v.toFixed(1)), least: 4 }],
  ];
  for (const [selector, lines, options] of charts) {
    const series = lines.map(([name, values, key, fill]) => ({ name, values, color: color(key), fill: Boolean(fill) }));
    drawChart($(selector), series, { step_s, ...options });
    const keys = series.map((one) => {
      const swatch = element("span", "swatch");
      swatch.style.background = one.color;
      return element("span", "", swatch, one.name);
    });
    $(selector).parentElement.querySelector(".keys").replaceChildren(...keys);
  }
}

function showRequests(live) {
  const rows = live.requests.slice(0, innerWidth < 700 ? 8 : 16).map((request) => requestRow(request, live.now));
  $("#requests .rows").replaceChildren(...(rows.length ? rows : [element("p", "empty", "no requests yet")]));
}

function requestRow(request, now) {
  const end = request.ended || now, whole = Math.max(1e-6, end - request.arrived);
  const where = request.decode || request.prefill ? `${request.prefill ? `${nameOf(request.prefill)} → ` : ""}${nameOf(request.decode) || "alone"}` : "–";
  const stack = element("div", "stack");
  const parts = { q: request.queue_s || (request.state === "queued" ? whole : 0), p: request.prefill_s || 0, h: request.exposed_s || 0 };
  if (request.state === "prefill" && !parts.p) parts.p = Math.max(0, whole - parts.q);
  parts.d = request.ttft_s ? Math.max(0, whole - parts.q - parts.p - parts.h) : 0;
  for (const [name, value] of Object.entries(parts)) {
    const part = element("i", name);
    part.style.width = `${Math.min(100, (100 * value) / whole)}%`;
    stack.append(part);
  }
  stack.title = `queue ${seconds(parts.q)}, prefill ${seconds(parts.p)}, exposed transfer ${seconds(parts.h)}, decode ${seconds(parts.d)}`;
  const expected = request.expected;
  const why = request.error || (expected ? `${expected.cached_tokens ? `${expected.cached_tokens} tokens cached, ` : ""}expected ${seconds(expected.ttft_s)}` : "waits for room");
  const user = `${request.prompt_tokens} → ${request.output_tokens} tokens${request.user ? ` · ${request.user}` : ""}${request.migrations ? ` · moved ${request.migrations}×` : ""}`;
  const row = element("div", "row",
    element("div", "id", request.id, element("small", "", user)),
    element("div", "where", where, element("span", "why", why)),
    element("div", "num", seconds(request.ttft_s), element("small", "", "first token")),
    element("div", "time", stack),
    element("div", "tagcell", element("span", `tag ${request.state}`, request.state)));
  row.title = request.error;
  return row;
}

function showEvents(live) {
  const items = [...live.events].reverse().map((event) => {
    const time = element("time", "", new Date(event.at * 1000).toLocaleTimeString([], { hour12: false }));
    return element("li", event.kind, time, element("span", "", event.text));
  });
  $("#events ol").replaceChildren(...(items.length ? items : [element("li", "empty", "nothing has happened")]));
}

function show(live) {
  if (started !== null && live.started !== started) lastHandoff = null;
  started = live.started;
  $("#banner").hidden = true;
  document.body.classList.remove("stale");
  $("#model").textContent = `${live.model.name} · ${live.model.max_model_len} tokens`;
  $("#health").className = `chip ${live.health.ready ? "good" : "bad"}`;
  $("#health span").textContent = live.health.ready ? "ready" : live.health.reason || "not ready";
  $("#uptime").textContent = `up ${duration(live.now - live.started)}`;
  showTiles(live);
  showPool("prefill", live);
  showPool("decode", live);
  showHandoffs(live);
  showCharts(live);
  showRequests(live);
  showEvents(live);
  document.body.dataset.shown = live.now;
}

function showBanner(text, health) {
  const banner = $("#banner");
  banner.hidden = false;
  banner.textContent = text;
  document.body.classList.add("stale");
  $("#health").className = "chip bad";
  $("#health span").textContent = health;
}

async function look() {
  try {
    const answer = await fetch("live.json", { signal: AbortSignal.timeout(5000) });
    const said = await answer.json();
    if (said.starting) showBanner(`The service is starting: ${said.starting}.`, "starting");
    else if (!answer.ok) throw new Error(`${answer.status}`);
    else show(said);
  } catch (error) {
    showBanner("The gateway does not answer. What is shown is the last that it said; this page goes on when it is back.", "no answer");
    console.warn(error);
  }
  setTimeout(look, document.hidden ? HIDDEN_INTERVAL_MS : INTERVAL_MS);
}

$("#explain form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = new FormData(event.target).get("prompt"), result = $("#explain .result");
  try {
    const answer = await fetch("explain", { method: "POST", body: JSON.stringify({ prompt }), headers: { "content-type": "application/json" } });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    const pairs = said.pairs.slice(0, 6).map((pair) => {
      const cached = pair.cached_tokens ? `, ${pair.cached_tokens} tokens cached` : "";
      const note = pair.refusal || `first token in ${seconds(pair.ttft_s)}, then ${seconds(pair.itl_s)}${cached}; handoff ${seconds(pair.handoff_s)}, others held up ${seconds(pair.others_s)}`;
      return element("div", pair.chosen ? "chosen" : "soft", `${pair.chosen ? "✓ " : ""}${pair.prefill ? `${nameOf(pair.prefill)} → ` : ""}${nameOf(pair.decode)}`, element("small", "", note));
    });
    result.replaceChildren(element("p", "", `${said.prompt_tokens} prompt tokens${said.pairs.some((pair) => pair.chosen) ? "" : ": it would wait"}`), ...pairs);
  } catch (error) {
    result.replaceChildren(element("p", "", error.message));
  }
});
$("#explain textarea").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("#explain form").requestSubmit(); }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) document.body.dataset.seen = "1"; });
look();
