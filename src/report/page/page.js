"use strict";
(() => {
  // The theme: that of the system until somebody chooses.
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  let theme = 0;
  const show = () => {
    if (theme) document.documentElement.dataset.theme = themes[theme];
    else delete document.documentElement.dataset.theme;
    button.textContent = "Theme: " + themes[theme];
  };
  button.hidden = false;
  button.addEventListener("click", () => { theme = (theme + 1) % 3; show(); });

  // A link to a stage opens it.
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  open();

  // The values of a chart at the pointer or, by the arrow keys, at a place of one's choice.
  const numbers = (text) => text.split(" ").map(Number);
  const round = (value) => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)
    ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  const places = new WeakMap();
  function read(figure, at) {
    const [x0, x1, left, right] = numbers(figure.dataset.x);
    const [y0, y1, top, bottom] = numbers(figure.dataset.y);
    const svg = figure.querySelector("svg");
    const pixel = Math.min(Math.max(at, left), right);
    places.set(figure, pixel);
    const value = (y) => y0 + (bottom - y) / (bottom - top) * (y1 - y0);
    const x = x0 + (pixel - left) / (right - left) * (x1 - x0);
    const found = [];
    if (figure.dataset.bars === "true") {
      for (const bar of svg.querySelectorAll("rect")) {
        const from = Number(bar.getAttribute("x")), width = Number(bar.getAttribute("width"));
        if (pixel >= from && pixel <= from + width) found.push(String(Math.round(value(Number(bar.getAttribute("y"))))) + " rows");
      }
    } else {
      const names = {};
      const article = figure.closest("article");
      for (const entry of article ? article.querySelectorAll("[data-color]") : []) names[entry.dataset.color] = entry.textContent;
      for (const line of svg.querySelectorAll("polyline")) {
        const name = names[line.getAttribute("stroke")];
        if (!name) continue;
        const points = line.getAttribute("points").trim().split(/\s+/).map((point) => point.split(",").map(Number));
        if (pixel < points[0][0] - 9 || pixel > points[points.length - 1][0] + 9) continue;
        let nearest = points[0];
        for (const point of points) if (Math.abs(point[0] - pixel) < Math.abs(nearest[0] - pixel)) nearest = point;
        found.unshift(name + " " + round(value(nearest[1])));
      }
    }
    let cursor = svg.querySelector(".cursor");
    if (!cursor) {
      cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
      cursor.setAttribute("class", "cursor");
      svg.append(cursor);
    }
    for (const [name, place] of [["x1", pixel], ["x2", pixel], ["y1", top], ["y2", bottom]]) cursor.setAttribute(name, place);
    figure.querySelector(".reading").textContent = "at " + Math.round(x) + ": " + (found.join(", ") || "nothing");
  }
  function leave(figure) {
    const cursor = figure.querySelector(".cursor");
    if (cursor) cursor.remove();
    figure.querySelector(".reading").textContent = "";
  }
  const figureOf = (event) => event.target instanceof Element ? event.target.closest("figure.chart") : null;
  document.addEventListener("pointermove", (event) => {
    const figure = figureOf(event);
    if (!figure) return;
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    read(figure, (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
  });
  document.addEventListener("pointerout", (event) => {
    const figure = figureOf(event);
    if (figure && !figure.contains(event.relatedTarget)) leave(figure);
  });
  document.addEventListener("focusout", (event) => { const figure = figureOf(event); if (figure) leave(figure); });
  document.addEventListener("keydown", (event) => {
    const figure = figureOf(event);
    const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!figure || !steps) return;
    const [, , left, right] = numbers(figure.dataset.x);
    const before = places.has(figure) ? places.get(figure) : steps > 0 ? left : right;
    read(figure, before + steps * (right - left) / 50);
    event.preventDefault();
  });

  // Served during a run, the page follows it. What is open stays open.
  if (document.body.dataset.live === undefined) return;
  async function follow() {
    try {
      const answer = await fetch(location.pathname, { headers: { "If-None-Match": '"' + document.body.dataset.live + '"' }, cache: "no-store" });
      if (answer.status === 200) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        const opened = new Set([...document.querySelectorAll("details")].filter((part) => part.open).map((part) => part.id));
        const closed = new Set([...document.querySelectorAll("details")].filter((part) => !part.open).map((part) => part.id));
        const focused = document.activeElement && document.activeElement.id;
        for (const part of fresh.querySelectorAll("details")) {
          if (opened.has(part.id)) part.open = true;
          if (closed.has(part.id)) part.open = false;
        }
        document.getElementById("main").replaceWith(fresh.getElementById("main"));
        document.body.dataset.live = fresh.body.dataset.live;
        if (focused && document.getElementById(focused)) document.getElementById(focused).focus();
      }
    } catch (error) {
      const state = document.getElementById("state");
      if (state && !state.dataset.gone) {
        state.dataset.gone = "yes";
        state.append(" (the report is not served any more)");
      }
      return;
    }
    setTimeout(follow, 2000);
  }
  setTimeout(follow, 2000);
})();
