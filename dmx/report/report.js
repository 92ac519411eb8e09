// At the pointer a chart tells what its lines are there. Without it the page lacks nothing else.
addEventListener("DOMContentLoaded", () => {
  for (const plot of document.querySelectorAll("[data-chart]")) {
    const chart = JSON.parse(plot.dataset.chart);
    const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
    const rule = Object.assign(document.createElement("div"), { className: "rule", hidden: true });
    plot.append(rule, tip);
    const show = (event) => {
      const box = plot.querySelector("svg").getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const at = chart.x[0] + share * (chart.x[1] - chart.x[0]);
      let found = at;
      const told = chart.lines.map((line) => {
        let best = 0;
        line.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(line.x[best] - at)) best = i; });
        found = line.x[best];
        return `${line.name}: ${line.y[best]}`;
      });
      tip.textContent = [`${chart.unit.split(",")[0]} ${+found.toPrecision(4)}`, ...told].join("\n");
      const left = 100 * (found - chart.x[0]) / (chart.x[1] - chart.x[0]);
      rule.style.left = tip.style.left = `${left}%`;
      tip.classList.toggle("before", left > 50);
      tip.hidden = rule.hidden = false;
    };
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", () => { tip.hidden = rule.hidden = true; });
  }
});
