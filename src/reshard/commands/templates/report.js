// The step under the pointer, in every plot at once. Without scripts the page lacks nothing but this.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = new Map(data.charts.map((chart) => [chart.key, chart]));
  const plots = [...document.querySelectorAll(".plot")].filter((plot) => charts.has(plot.dataset.chart));
  const steps = [...new Set(data.charts.flatMap((c) => c.lines.flatMap((l) => l.points.map((p) => p[0]))))].sort((a, b) => a - b);
  let chosen = null;

  const nearest = (sorted, wanted, of) => {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (of(sorted[middle]) < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && wanted - of(sorted[low - 1]) <= of(sorted[low]) - wanted ? low - 1 : low;
  };
  const layoutAt = (step) => {
    const found = data.stretches.filter((s) => s.from < step && step <= s.to).pop();
    return found ? found.layout : "";
  };
  const hide = () => {
    chosen = null;
    for (const plot of plots) for (const part of plot.querySelectorAll(".cursor, .tip")) part.hidden = true;
  };
  const show = (step, active) => {
    chosen = step;
    const left = 100 * (step - data.low) / (data.high - data.low);
    for (const plot of plots) {
      const cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
      cursor.hidden = false;
      cursor.style.left = `${left}%`;
      tip.hidden = plot !== active;
      if (plot !== active) continue;
      const rows = [`step ${step.toLocaleString("en")}`];
      for (const line of charts.get(plot.dataset.chart).lines) {
        const point = line.points[nearest(line.points, step, (p) => p[0])];
        const there = point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`;
        rows.push(`${line.name} ${point[1]}${there}`);
      }
      const layout = layoutAt(step);
      if (layout) rows.push(layout);
      tip.replaceChildren(...rows.map((text, i) => {
        const row = document.createElement(i ? "div" : "b");
        row.textContent = text;
        return row;
      }));
      const room = plot.clientWidth, x = left / 100 * room;
      tip.style.left = `${Math.max(0, Math.min(x + 10 + tip.offsetWidth > room ? x - 10 - tip.offsetWidth : x + 10, room - tip.offsetWidth))}px`;
    }
  };
  if (!steps.length) return;
  for (const plot of plots) {
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const wanted = data.low + (event.clientX - box.left) / box.width * (data.high - data.low);
      show(steps[nearest(steps, wanted, (s) => s)], plot);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!move) return;
      event.preventDefault();
      const at = chosen === null ? steps.length - 1 : nearest(steps, chosen, (s) => s) + move;
      show(steps[Math.max(0, Math.min(steps.length - 1, at))], plot);
    });
  }
})();
