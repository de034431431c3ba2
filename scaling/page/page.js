"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Numbers as people read them; the same forms as the page's own text.
  const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const raised = (n) => String(n).replace("-", "⁻").replace(/\d/g, (d) => SUPERSCRIPT[d]);
  const significant = (v, digits = 3) => String(Number(v.toPrecision(digits)));
  const powerOfTen = (v, digits = 3) => {
    const [mantissa, exponent] = v.toExponential(digits - 1).split("e");
    const factor = String(Number(mantissa));
    return (factor === "1" ? "" : factor + " × ") + "10" + raised(Number(exponent));
  };
  const short = (v) => {
    for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (v >= scale * 0.9995) return significant(v / scale) + letter;
    }
    return significant(v);
  };
  const duration = (s) => (s < 90 ? s.toFixed(0) + " s" : s < 5400 ? (s / 60).toFixed(1) + " min"
    : s < 172800 ? (s / 3600).toFixed(1) + " h" : short(s / 86400) + " days");

  function sortable(table) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    headings.forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const rising = heading.getAttribute("aria-sort") !== "ascending";
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const rows = [...body.rows];
        const numeric = heading.dataset.kind === "number";
        rows.sort((a, b) => {
          const x = value(a, column), y = value(b, column);
          // What is not there goes last, whichever way the rest is sorted.
          if (x === "" || y === "") return (x === "") - (y === "");
          const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
          return rising ? order : -order;
        });
        body.append(...rows);
      });
    });
  }

  function interpolate(grid, key, logBudget) {
    const x = grid.log10_budget, y = grid[key];
    let right = x.findIndex((v) => v >= logBudget);
    if (right === -1) right = x.length - 1;
    if (right === 0) right = 1;
    const share = (logBudget - x[right - 1]) / (x[right] - x[right - 1]);
    return Math.exp(Math.log(y[right - 1]) * (1 - share) + Math.log(y[right]) * share);
  }

  function ask(laws) {
    const slider = byId("budget");
    const power = (law, budget) => (law.floor || 0) + law.coefficient * budget ** law.exponent;
    const loss = (logBudget) => laws.band ? interpolate(laws.band, "value", logBudget) : power(laws.loss, 10 ** logBudget);
    const chart = drawChart(laws, loss);

    function answer() {
      const logBudget = Number(slider.value), budget = 10 ** logBudget;
      byId("budget-out").textContent = powerOfTen(budget) + " FLOPs";
      slider.setAttribute("aria-valuetext", powerOfTen(budget) + " FLOPs");
      for (const [id, law, grid] of [["answer-params", laws.params, laws.params_band], ["answer-data", laws.data, laws.data_band]]) {
        if (!law) continue;
        byId(id).firstChild.textContent = short(power(law, budget));
        byId(id).lastChild.textContent = grid
          ? short(interpolate(grid, "low", logBudget)) + " to " + short(interpolate(grid, "high", logBudget)) : "";
      }
      const value = loss(logBudget);
      byId("answer-loss").firstChild.textContent = value.toFixed(4);
      let ends = null;
      if (laws.band) {
        ends = ["low", "high"].map((key) => interpolate(laws.band, key, logBudget));
        byId("answer-loss").lastChild.textContent = ends[0].toFixed(4) + " to " + ends[1].toFixed(4);
      }
      if (laws.flops_per_second) byId("answer-time").firstChild.textContent = duration(budget / laws.flops_per_second);
      const [least, most] = laws.fitted;
      const place = byId("beyond");
      const inside = budget >= least * 0.999 && budget <= most * 1.001;
      place.firstChild.textContent = inside ? "inside the fitted range" : budget > most
      ? Number(significant(budget / most, 2)).toLocaleString("en") + "× the largest fitted budget"
      : "1/" + Number(significant(least / budget, 2)).toLocaleString("en") + " of the smallest fitted budget";
      place.firstChild.className = "verdict " + (inside ? "good" : "wait");
      place.lastChild.textContent = inside ? "Runs on both sides of this budget were measured."
        : budget > most ? "The law is carried past its largest fitted budget: trust the interval, not the line."
          : "Smaller than anything that was fitted.";
      chart(logBudget, value, ends);
    }
    slider.addEventListener("input", answer);
    document.querySelectorAll("[data-budget]").forEach((button) => button.addEventListener("click", () => {
      slider.value = String(Math.log10(Number(button.dataset.budget)));
      answer();
    }));
    answer();
  }

  // A small chart of the law with a mark at the slider's budget.
  function drawChart(laws, loss) {
    const svg = byId("ask-chart");
    const box = { left: 48, right: 552, top: 12, bottom: 332 };
    const [from, to] = laws.slider.map(Math.log10);
    const steps = Array.from({ length: 61 }, (_, i) => from + (to - from) * i / 60);
    const line = steps.map(loss);
    const low = laws.band ? steps.map((x) => interpolate(laws.band, "low", x)) : line;
    const high = laws.band ? steps.map((x) => interpolate(laws.band, "high", x)) : line;
    const marks = [...low, ...high, ...(laws.outcome ? [laws.outcome.loss] : [])];
    const ends = [Math.log(Math.min(...marks)), Math.log(Math.max(...marks))];
    const room = 0.04 * (ends[1] - ends[0]);
    const x = (v) => box.left + (box.right - box.left) * (v - from) / (to - from);
    const y = (v) => box.bottom - (box.bottom - box.top) * (Math.log(v) - ends[0] + room) / (ends[1] - ends[0] + 2 * room);
    const points = (values) => values.map((v, i) => x(steps[i]).toFixed(1) + "," + y(v).toFixed(1));
    const [least, most] = laws.fitted.map(Math.log10);
    let drawing = `<rect class="range" x="${x(least)}" width="${x(most) - x(least)}" y="${box.top}" height="${box.bottom - box.top}"/>`;
    drawing += `<text x="${(x(least) + x(most)) / 2}" y="${box.bottom - 8}" text-anchor="middle">fitted range</text>`;
    for (let decade = Math.ceil(from); decade <= to; decade++) {
      drawing += `<line class="axis" x1="${x(decade)}" x2="${x(decade)}" y1="${box.top}" y2="${box.bottom}"/>`
        + `<text x="${x(decade)}" y="${box.bottom + 18}" text-anchor="middle">10${raised(decade)}</text>`;
    }
    const span = Math.exp(ends[1]) - Math.exp(ends[0]);
    const step = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 50].find((s) => span / s <= 7) || 100;
    for (let tick = Math.ceil(Math.exp(ends[0]) / step) * step; tick <= Math.exp(ends[1]); tick += step) {
      drawing += `<line class="axis" x1="${box.left}" x2="${box.right}" y1="${y(tick)}" y2="${y(tick)}"/>`
        + `<text x="${box.left - 7}" y="${y(tick) + 4}" text-anchor="end">${Number(tick.toFixed(6))}</text>`;
    }
    drawing += `<polygon class="band" points="${points(high).concat(points(low).reverse()).join(" ")}"/>`;
    drawing += `<polyline class="law" points="${points(line).join(" ")}"/>`;
    drawing += `<text x="${(box.left + box.right) / 2}" y="${box.bottom + 36}" text-anchor="middle">training compute (FLOPs); vertical: loss</text>`;
    let star = "";
    if (laws.outcome) {
      const above = laws.band ? interpolate(laws.band, "high", Math.log10(laws.outcome.budget)) : 0;
      const mark = x(Math.log10(laws.outcome.budget));
      // Half of the word is up to 40 wide, and what leaves the drawing is cut.
      const near = mark > box.right - 40, place = near ? box.right + 6 : mark;
      const over = y(Math.max(laws.outcome.loss, above)) - 12;
      const height = over < box.top + 6 ? y(laws.outcome.loss) + 26 : over;
      star = `<circle class="star" r="5" cx="${mark}" cy="${y(laws.outcome.loss)}"/>`
        + `<text x="${place}" y="${height}" text-anchor="${near ? "end" : "middle"}">measured</text>`;
    }
    drawing += '<line class="cursor"/><line class="bar"/><circle class="dot" r="9"/>' + star;
    svg.innerHTML = drawing;
    const [cursor, bar, dot] = ["cursor", "bar", "dot"].map((name) => svg.querySelector("." + name));
    const set = (node, values) => Object.entries(values).forEach(([key, v]) => node.setAttribute(key, v.toFixed(1)));
    return (logBudget, value, limits) => {
      const place = x(logBudget);
      set(cursor, { x1: place, x2: place, y1: box.top, y2: box.bottom });
      if (limits) set(bar, { x1: place, x2: place, y1: y(limits[0]), y2: y(limits[1]) });
      set(dot, { cx: place, cy: y(value) });
    };
  }

  document.querySelectorAll("table.sortable").forEach(sortable);
  const laws = JSON.parse(byId("laws").textContent);
  if (laws && byId("budget")) ask(laws);
})();
