"use strict";
// One plot for each entry of DATA.sections, drawn when it comes into view.
(() => {
  const panels = [...document.querySelectorAll("details.panel")];
  if (!panels.length) return;
  const smoothing = document.getElementById("smoothing");
  const hidden = new Set(); // indices of runs
  const drawn = new Map(); // figure -> uPlot
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (index) => style(`--series-${index % 8}`);
  const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
  const several = DATA.runs.length > 1;

  // Exponential mean with its start's bias removed; weight 0 leaves the values alone.
  function smooth(values, weight) {
    let mean = 0, mass = 0;
    return values.map((value) => {
      mean = weight * mean + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return mean / mass;
    });
  }

  function lines(plot) {
    const found = [];
    DATA.runs.forEach((run, r) => plot.names.forEach((name, n) => {
      const x = [], y = [];
      (run.columns[name] || []).forEach((value, i) => {
        if (value !== null) { x.push(run.columns.step[i]); y.push(value); }
      });
      if (!x.length) return;
      const short = name.includes("/") ? name.slice(name.indexOf("/") + 1) : name;
      found.push({
        run: r, name, x, y,
        label: several ? (plot.names.length > 1 ? `${run.name} · ${short}` : run.name) : short,
        index: several ? r : n,
        dash: several ? DASHES[n % 4] : DASHES[Math.floor(n / 8) % 4],
      });
    }));
    return found;
  }

  const number = (value) => value === null || value === undefined ? "" : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));

  function draw(figure) {
    const { plot, off } = figure.state;
    const weight = Number(smoothing.value) / 100;
    const all = lines(plot).filter((line) => !hidden.has(line.run));
    const box = figure.querySelector(".plot"), legend = figure.querySelector(".legend");
    if (drawn.has(figure)) drawn.get(figure).destroy();
    legend.replaceChildren();
    box.replaceChildren();
    if (!all.length) { box.append(make("p", { class: "hint" }, "no values")); drawn.delete(figure); return; }
    const series = [{ label: "step" }], tables = [], outputs = [];
    for (const line of all) {
      const stroke = color(line.index), show = !off.has(line.label), few = line.x.length < 40;
      const smoothed = weight > 0 && !few && line.name !== "policy/learning_rate"; // a schedule has no noise
      if (smoothed) {
        series.push({ label: line.label, stroke, alpha: 0.28, width: 1, show, points: { show: false }, spanGaps: true });
        tables.push([line.x, line.y]);
      }
      series.push({ label: line.label, stroke, width: 1.8, dash: line.dash, show, points: { show: few, size: 5, fill: stroke }, spanGaps: true });
      tables.push([line.x, smoothed ? smooth(line.y, weight) : line.y]);
      const at = series.length - 1;
      const output = make("span", { class: "value" }, number(tables[at - 1][1].at(-1)));
      outputs.push([at, output, tables[at - 1][1].at(-1)]);
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.borderTopColor = stroke;
      swatch.style.borderTopStyle = line.dash.length ? "dashed" : "solid";
      legend.append(make("button", {
        type: "button", "aria-pressed": String(show), title: line.name,
        onclick: () => { if (off.has(line.label)) off.delete(line.label); else off.add(line.label); draw(figure); },
      }, swatch, line.label, output));
    }
    const ink = style("--muted"), grid = { stroke: style("--grid"), width: 1 };
    const font = "11px system-ui, sans-serif";
    const chart = new uPlot({
      width: box.clientWidth, height: 190, series,
      legend: { show: false },
      cursor: { sync: { key: "steps", setSeries: false }, points: { size: 6 } },
      scales: { x: { time: false } },
      axes: [
        { stroke: ink, grid, ticks: grid, font, size: 30, values: (u, ticks) => ticks.map((tick) => Number.isInteger(tick) ? tick : "") },
        { stroke: ink, grid, ticks: grid, font, size: 56, values: (u, ticks) => ticks.map((tick) => number(tick) || "0") },
      ],
      hooks: { setCursor: [(u) => {
        for (const [at, output, last] of outputs) output.textContent = number(u.cursor.idx === null || u.cursor.idx === undefined ? last : nearest(u.data[at], u.cursor.idx));
      }] },
    }, uPlot.join(tables), box);
    drawn.set(figure, chart);
    box.setAttribute("aria-label", all.map((line) => `${line.label}: ${number(line.y[0])} at first, ${number(line.y.at(-1))} at last, ${line.x.length} points`).join("; "));
  }

  // Curves with few points have gaps at most steps: the point before the cursor is shown.
  function nearest(values, index) {
    while (index > 0 && (values[index] === null || values[index] === undefined)) index -= 1;
    return values[index];
  }

  const visible = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
  }, { rootMargin: "200px" });

  for (const panel of panels) {
    const section = DATA.sections[Number(panel.dataset.section)];
    for (const plot of section.plots) {
      const figure = make("figure", {}, make("figcaption", {}, plot.title), make("div", { class: "plot", role: "img", "aria-label": plot.title }), make("div", { class: "legend" }));
      figure.state = { plot, off: new Set() };
      panel.querySelector(".plots").append(figure);
      visible.observe(figure);
    }
  }
  const again = () => { for (const figure of [...drawn.keys()]) draw(figure); };
  const say = () => { document.getElementById("smoothing-value").textContent = (Number(smoothing.value) / 100).toFixed(2); };
  smoothing.addEventListener("input", () => { say(); again(); });
  document.addEventListener("theme", again);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(again, 150); });
  say();
  const toggles = document.getElementById("run-toggles");
  toggles.hidden = !several;
  if (several) DATA.runs.forEach((run, r) => {
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.borderTopColor = `var(--series-${r % 8})`;
    toggles.append(make("label", {}, make("input", { type: "checkbox", checked: true, onchange: (event) => {
      if (event.target.checked) hidden.delete(r); else hidden.add(r);
      again();
    } }), swatch, run.name));
  });
})();
