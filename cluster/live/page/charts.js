// Line charts over the last minutes, as plain SVG.
const NS = "http://www.w3.org/2000/svg";
const LEFT = 34, RIGHT = 4, TOP = 8, BOTTOM = 18;

export function svg(tag, attributes = {}, text = "") {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

// The smallest of 1, 2, 5, 10 … that is not below a value.
function niceAbove(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * power).find((bound) => bound >= value * 0.999);
}

// series: [{name, values (null: none), color, fill}]; options: {format, step_s, most, goal}
export function drawChart(element, series, options) {
  const width = element.clientWidth || 280, height = element.clientHeight || 132;
  const plotWidth = width - LEFT - RIGHT, plotHeight = height - TOP - BOTTOM;
  const known = series.flatMap((one) => one.values.filter((value) => value !== null));
  const most = options.most ?? niceAbove(Math.max(options.goal && known.length ? options.goal * 1.05 : 0, ...known, options.least ?? 0));
  const count = series[0].values.length;
  const x = (i) => LEFT + (i / (count - 1)) * plotWidth;
  const y = (value) => TOP + plotHeight * (1 - Math.min(value, most) / most);
  element.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(most * share), y2: y(most * share) }));
    parts.push(svg("text", { x: LEFT - 6, y: y(most * share) + 3.5, "text-anchor": "end" }, options.format(most * share)));
  }
  parts.push(svg("text", { x: LEFT, y: height - 3 }, `${Math.round((count * options.step_s) / 60)} min ago`));
  parts.push(svg("text", { x: width - RIGHT, y: height - 3, "text-anchor": "end" }, "now"));
  if (options.goal && options.goal <= most) parts.push(svg("line", { class: "goal", x1: LEFT, x2: width - RIGHT, y1: y(options.goal), y2: y(options.goal) }));
  for (const one of series) {
    for (const run of runsOf(one.values)) {
      const points = run.map(([i, value]) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`);
      if (one.fill) {
        const [first, last] = [run[0][0], run[run.length - 1][0]];
        const outline = `M${x(first)},${y(0)}L${points.join("L")}L${x(last)},${y(0)}Z`;
        parts.push(svg("path", { d: outline, fill: one.color, opacity: 0.14 }));
      }
      if (run.length === 1) parts.push(svg("circle", { cx: x(run[0][0]), cy: y(run[0][1]), r: 2, fill: one.color }));
      else parts.push(svg("polyline", { class: "line", points: points.join(" "), style: `stroke: ${one.color}` }));
    }
  }
  element.replaceChildren(...parts);
  follow(element, series, options, { x, count, width, height });
}

// The stretches in which a series has values.
function runsOf(values) {
  const runs = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (i === 0 || values[i - 1] === null) runs.push([]);
    runs[runs.length - 1].push([i, value]);
  });
  return runs;
}

// Values under the pointer.
function follow(element, series, options, { x, count, width, height }) {
  const show = (clientX) => {
    element.querySelectorAll(".cursor, .tip").forEach((old) => old.remove());
    const at = clientX - element.getBoundingClientRect().left;
    const i = Math.max(0, Math.min(count - 1, Math.round(((at - LEFT) / (width - LEFT - RIGHT)) * (count - 1))));
    const shown = series.filter((one) => one.values[i] !== null).map((one) => `${one.name} ${options.format(one.values[i])}`);
    element.append(svg("line", { class: "cursor", x1: x(i), x2: x(i), y1: TOP, y2: height - BOTTOM }));
    const right = x(i) > width / 2;
    element.append(svg("text", { class: "tip", x: x(i) + (right ? -6 : 6), y: TOP + 8, "text-anchor": right ? "end" : "start" }, shown.join(" · ") || "nothing"));
  };
  element.onpointermove = (event) => show(event.clientX);
  element.onpointerleave = () => element.querySelectorAll(".cursor, .tip").forEach((old) => old.remove());
}
