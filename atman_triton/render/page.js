"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const all = data.explanations;
  const overlay = all.length > 1;
  const text = byId("text");
  const spans = [...text.querySelectorAll("[data-p]")];
  const FIRST = overlay ? 6 : 15; // rows of a ranking before "more"
  const state = { row: all.map(() => 0), on: all.map(() => true), shown: all.map(() => FIRST), cursor: -1, pinned: -1 };

  // Python counts code points, so strings are cut by code points here too.
  for (const e of all) e.characters = Array.from(e.text);

  const element = (tag, name, ...children) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    node.append(...children);
    return node;
  };

  // Which spans a unit lies over; units outside the shared text lie over none.
  const places = all.map(() => new Map());
  data.pieces.forEach((piece, index) => piece.forEach((units, k) => units.forEach((unit) => {
    if (!places[k].has(unit)) places[k].set(unit, []);
    places[k].get(unit).push(index);
  })));

  /* Numbers. A value is a number in nats, or null where nothing was measured. */

  const views = new Map();
  const view = (k) => {
    const key = k + ":" + state.row[k];
    if (!views.has(key)) {
      const values = all[k].rows[state.row[k]];
      const order = [];
      let peak = 0;
      values.forEach((value, unit) => {
        if (value === null || !places[k].has(unit)) return;
        order.push(unit);
        if (Math.abs(value) < data.infinity) peak = Math.max(peak, Math.abs(value));
      });
      order.sort((a, b) => values[b] - values[a] || a - b);
      const rank = new Map(order.map((unit, place) => [unit, place + 1]));
      const digits = peak ? Math.max(0, Math.min(8, 2 - Math.floor(Math.log10(peak)))) : 2;
      views.set(key, { values, order, rank, peak, digits });
    }
    return views.get(key);
  };
  const strength = ({ values, peak }, unit) => {
    const value = values[unit];
    return value === null ? 0 : Math.max(-1, Math.min(1, peak ? value / peak : Math.sign(value)));
  };
  const strongest = (v, units) =>
    units.map((unit) => strength(v, unit)).reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
  const signed = (value, digits) => {
    if (value === null) return "not measured";
    const text = Math.abs(value) >= data.infinity ? "∞" : Math.abs(value).toFixed(digits);
    return (Number(text) === 0 ? "" : value < 0 ? "−" : "+") + text;
  };
  const percent = (logprob) => {
    const p = 100 * Math.exp(logprob);
    return (p >= 10 ? p.toFixed(1) : p >= 1e-3 ? p.toPrecision(2) : p > 0 ? p.toExponential(1) : "0") + "%";
  };

  /* Words. */

  const visible = (string) => {
    const line = string.replaceAll("\n", "↵");
    const core = line.replace(/^ +| +$/g, "");
    return core || "␣".repeat(line.length) || "∅";
  };
  const context = (k, unit, size) => {
    const { characters, units } = all[k];
    const [start, stop] = units[unit];
    const piece = characters.slice(start, stop).join("");
    const lead = piece.trim() ? piece.length - piece.trimStart().length : 0;
    const flat = (from, to) => characters.slice(Math.max(0, from), to).join("").replaceAll("\n", " ");
    let before = flat(start - size, start + lead), after = flat(stop, stop + size);
    // Cut at whole words.
    if (start > size) before = "…" + before.replace(/^\S*\s+(?=\S)/, "");
    if (stop + size < characters.length) after = after.replace(/(\S)\s+\S*$/, "$1") + "…";
    return [before, element("b", "", visible(piece)), after];
  };

  /* Colours. */

  const paint = () => {
    const shown = all.map((_, k) => view(k));
    spans.forEach((span, index) => {
      const levels = data.pieces[index].map((units, k) => (state.on[k] ? strongest(shown[k], units) : 0));
      span.classList.remove("p", "n", "m0", "m1", "m2", "m3", "m4", "m5");
      span.removeAttribute("style");
      if (!overlay) {
        const level = levels[0];
        if (Math.abs(level) < data.weak) return;
        span.classList.add(level > 0 ? "p" : "n");
        span.style.setProperty("--v", Math.abs(level).toFixed(3));
        return;
      }
      const layers = levels.map((level, k) => [level, k]).filter(([level]) => level >= data.faint);
      if (!layers.length) return;
      const share = 100 / layers.length;
      const bands = layers.map(([level, k], i) =>
        `rgb(var(--overlay${k % data.colours}) / ${level.toFixed(3)}) ${i * share}% ${(i + 1) * share}%`);
      span.style.backgroundImage = `linear-gradient(${bands.join(", ")})`;
      const [top, k] = layers.reduce((a, b) => (b[0] > a[0] ? b : a));
      if (top >= data.strong) span.classList.add("m" + (k % 6));
    });
    const scale = byId("scale");
    if (scale) {
      const { peak, digits } = shown[0];
      scale.replaceChildren(...[`−${peak.toFixed(digits)} opposes`, "0", `supports +${peak.toFixed(digits)} nats`].map((s) => element("span", "", s)));
    }
  };

  /* One unit's numbers. */

  const describe = (index) => {
    const box = byId("detail");
    if (index < 0) {
      box.replaceChildren(element("p", "hint", "Point at the text, or focus it and use the arrow keys, to see numbers."));
      return;
    }
    const blocks = [];
    data.pieces[index].forEach((units, k) => {
      if (!state.on[k]) return;
      const e = all[k], v = view(k), row = state.row[k];
      for (const unit of units) {
        const value = v.values[unit];
        const list = element("dl", "");
        const add = (term, number) => list.append(element("dt", "", term), element("dd", "", number));
        add(row ? `score for “${e.targets[row - 1]}”` : "relevance", signed(value, v.digits) + (value === null ? "" : " nats"));
        if (value !== null) add("rank", `${v.rank.get(unit)} of ${v.order.length}`);
        const rows = row ? [row] : e.targets.map((_, t) => t + 1);
        const scores = rows.map((r) => e.rows[r][unit]);
        if (!scores.includes(null)) {
          const base = rows.reduce((sum, r) => sum + e.base[r - 1], 0);
          const loss = scores.reduce((sum, score) => sum + score, 0);
          add(row ? "its probability" : "answer’s probability", `${percent(base)} → ${percent(base - loss)}`);
        } else if (value === null) {
          add("why", "stands at or after the target");
        }
        const title = element("p", "context", ...context(k, unit, 34));
        if (overlay) title.prepend(letter(k), " ");
        blocks.push(title, list);
      }
    });
    const target = spans[index].dataset.t;
    if (!blocks.length) {
      blocks.push(element("p", "context", element("b", "", visible(spans[index].textContent))));
      blocks.push(element("p", "hint", target === undefined ? "Not a unit." : "A target token: choose it to see what supports it."));
    }
    box.replaceChildren(...blocks);
  };
  const letter = (k) => {
    const node = element("span", "letter", all[k].letter);
    node.style.backgroundColor = `rgb(var(--overlay${k % data.colours}))`;
    return node;
  };

  /* The ranking. */

  const light = (k, unit, on) => (places[k].get(unit) || []).forEach((i) => spans[i].classList.toggle("lit", on));

  const entry = (k, unit) => {
    const v = view(k), level = strength(v, unit);
    const fill = element("span", "fill" + (level < 0 ? " against" : ""));
    fill.style.width = (100 * Math.abs(level)).toFixed(1) + "%";
    if (overlay) fill.style.backgroundColor = `rgb(var(--overlay${k % data.colours}))`;
    const button = element("button", "row",
      element("span", "rank", String(v.rank.get(unit))), element("span", "context", ...context(k, unit, 18)),
      element("span", "number", signed(v.values[unit], v.digits)), element("span", "track", fill));
    button.type = "button";
    for (const name of ["mouseenter", "focus"]) button.addEventListener(name, () => light(k, unit, true));
    for (const name of ["mouseleave", "blur"]) button.addEventListener(name, () => light(k, unit, false));
    button.addEventListener("click", () => {
      const index = (places[k].get(unit) || [-1])[0];
      if (index < 0) return;
      pin(index);
      spans[index].scrollIntoView({ block: "center" });
    });
    return element("li", "", button);
  };
  const rank = () => {
    const nodes = [];
    all.forEach((e, k) => {
      if (!state.on[k]) return;
      const v = view(k);
      const supporters = v.order.filter((unit) => v.values[unit] > 0);
      const opponents = v.order.filter((unit) => strength(v, unit) <= -data.strong).reverse();
      const title = element("h2", "", overlay ? "Supports this answer" : "Supports the answer most");
      if (overlay) title.prepend(letter(k), " ");
      // At first only those that tell something, but never fewer than three.
      const telling = Math.max(3, supporters.filter((unit) => strength(v, unit) >= data.telling).length);
      const count = state.shown[k] > FIRST ? state.shown[k] : Math.min(FIRST, telling);
      nodes.push(title, element("ol", "list", ...supporters.slice(0, count).map((unit) => entry(k, unit))));
      if (!supporters.length) nodes.push(element("p", "hint", "No unit does."));
      if (supporters.length > count) {
        const more = element("button", "more", `Show more of ${supporters.length}`);
        more.type = "button";
        more.addEventListener("click", () => { state.shown[k] += 50; rank(); });
        nodes.push(more);
      }
      if (opponents.length && !overlay) {
        nodes.push(element("h2", "", "Opposes it"), element("ol", "list", ...opponents.slice(0, 5).map((unit) => entry(k, unit))));
      }
    });
    byId("ranking").replaceChildren(...nodes);
  };

  /* Choosing. */

  const refresh = () => { paint(); rank(); describe(state.pinned >= 0 ? state.pinned : state.cursor); };
  const choose = (k, row) => {
    state.row[k] = row;
    state.shown[k] = FIRST;
    if (!overlay) {
      for (const span of spans) span.classList.toggle("sel", span.dataset.t === String(row - 1));
      const radio = document.querySelector(`input[name="target"][value="${row}"]`);
      if (radio) radio.checked = true;
    }
    refresh();
  };
  const move = (index) => {
    if (state.cursor >= 0) spans[state.cursor].classList.remove("cur");
    state.cursor = index;
    if (index >= 0) {
      spans[index].classList.add("cur");
      spans[index].scrollIntoView({ block: "nearest" });
    }
    describe(index);
  };
  const pin = (index) => { state.pinned = index; move(index); };
  const pick = (index) => {
    if (index < 0) return;
    const target = spans[index].dataset.t;
    if (target !== undefined && !overlay && state.row[0] !== Number(target) + 1) choose(0, Number(target) + 1);
    pin(index);
  };
  const indexOf = (node) => {
    const span = node.closest ? node.closest("[data-p]") : null;
    return span ? Number(span.dataset.p) : -1;
  };
  const byRank = (step) => {
    // The ranking of the first explanation in sight.
    const k = state.on.indexOf(true);
    if (k < 0) return;
    const { order, rank: ranks } = view(k);
    if (!order.length) return;
    const here = state.cursor < 0 ? [] : data.pieces[state.cursor][k].filter((unit) => ranks.has(unit));
    const at = here.length ? ranks.get(here[0]) - 1 : -step;
    move(places[k].get(order[Math.max(0, Math.min(order.length - 1, at + step))])[0]);
  };

  text.addEventListener("mouseover", (event) => { if (state.pinned < 0) { const i = indexOf(event.target); if (i >= 0) describe(i); } });
  text.addEventListener("mouseleave", () => { if (state.pinned < 0) describe(state.cursor); });
  text.addEventListener("click", (event) => {
    const index = indexOf(event.target);
    if (index < 0) pin(-1); else pick(index);
  });
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = spans.length - 1;
    const actions = {
      ArrowRight: () => move(Math.min(last, state.cursor + 1)),
      ArrowLeft: () => move(Math.max(0, state.cursor - 1)),
      ArrowDown: () => byRank(1),
      ArrowUp: () => byRank(-1),
      Home: () => move(0),
      End: () => move(last),
      Enter: () => pick(state.cursor),
      " ": () => pick(state.cursor),
      Escape: () => pin(-1),
    };
    if (!actions[event.key] || last < 0) return;
    event.preventDefault();
    if (!["Enter", " "].includes(event.key)) state.pinned = -1;
    actions[event.key]();
  });
  for (const radio of document.querySelectorAll('input[name="target"]')) {
    radio.addEventListener("change", () => choose(0, Number(radio.value)));
  }
  for (const box of document.querySelectorAll("input[data-k]")) {
    box.addEventListener("change", () => { state.on[Number(box.dataset.k)] = box.checked; refresh(); });
  }
  for (const select of document.querySelectorAll("select[data-k]")) {
    select.addEventListener("change", () => choose(Number(select.dataset.k), Number(select.value)));
  }

  const theme = byId("theme");
  const themes = ["auto", "light", "dark"];
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % themes.length];
    document.documentElement.dataset.theme = next;
    theme.textContent = "Theme: " + next;
  });

  refresh();
})();
