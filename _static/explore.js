// Steps through the stored states of explorers where no kernel runs, from file:// too. Without this script, or in a
// browser that cannot unpack, the first state stands with its words.
// Contract (measured/plots.py): figure.explorer with an img, p.explorer-state and a script of JSON: controls (name,
// kind, steps), states (a step for each control, text alternative, number of the picture; 0 is the img's own), and the
// other pictures. The address may name a state: #explore-2:batch=8&bits=4. Nothing else is kept.
"use strict";
{
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);

  async function unpack(pack) {
    const bytes = Uint8Array.from(atob(pack.split(",")[1]), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const [pieces, pictures] = JSON.parse(await new Response(stream).text());
    const texts = pictures.map((numbers) => numbers.map((number) => pieces[number]).join(""));
    return texts.map((text) => (text.startsWith("<") ? "data:image/svg+xml," + encodeURIComponent(text) : text));
  }

  // A native control with its label; get and set speak of the number of a step.
  function control({ name, kind, steps }) {
    const label = make("label");
    const input = kind === "select" ? make("select") : make("input", { type: kind });
    const value = make("span", { className: "explorer-value" });
    label.append(name.replaceAll("_", " "), input);
    if (kind === "select") input.append(...steps.map((step, i) => new Option(step, i)));
    if (kind === "range") label.append(Object.assign(input, { min: 0, max: steps.length - 1 }), value);
    if (kind === "checkbox") {
      return { label, get: () => steps.indexOf(input.checked ? "yes" : "no"), set: (i) => (input.checked = steps[i] === "yes") };
    }
    const set = (i) => {
      input.value = i;
      value.textContent = steps[i];
      if (kind === "range") input.setAttribute("aria-valuetext", steps[i]);
    };
    return { label, get: () => Number(input.value), set };
  }

  async function begin(figure, number) {
    const { controls, states, pictures } = JSON.parse(figure.querySelector("script").textContent);
    if (states.length < 2) return;
    const image = figure.querySelector("img");
    const sources = [image.src, ...(await unpack(pictures))];
    const fields = controls.map(control);
    const box = make("div", { className: "explorer-controls" });
    const said = make("output", { className: "explorer-said" }); // a screen reader says what is put in here
    figure.id = `explore-${number}`;

    function show([steps, alt, picture]) {
      Object.assign(image, { src: sources[picture], alt });
      fields.forEach((field, i) => field.set(steps[i]));
    }

    // Where not every combination is stored, the one that agrees in most controls is shown.
    function move(i) {
      const wanted = fields.map((field) => field.get());
      const agree = ([steps]) => steps.filter((step, j) => step === wanted[j]).length;
      const near = states.filter(([steps]) => steps[i] === wanted[i]).sort((a, b) => agree(b) - agree(a))[0];
      const values = controls.map(({ name, steps }, j) => [name, steps[near[0][j]]]);
      show(near);
      said.value = `${values.map((pair) => pair.join(" ")).join(", ")}. ${near[1]}`;
      try {
        history.replaceState(history.state, "", `#${figure.id}:${new URLSearchParams(values)}`);
      } catch {} // a page whose address may not change
    }

    function follow() {
      const [, id, values] = /^#(explore-\d+):(.*)$/.exec(location.hash) ?? [];
      const wanted = new URLSearchParams(values);
      const steps = controls.map(({ name, steps }) => (wanted.has(name) ? steps.indexOf(wanted.get(name)) : 0));
      const state = id === figure.id && states.find(([own]) => own.every((step, i) => step === steps[i]));
      if (!state) return;
      show(state);
      figure.scrollIntoView();
    }

    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Controls of the figure");
    fields.forEach(({ label }, i) => {
      label.addEventListener("input", () => move(i));
      if (controls[i].steps.length > 1) box.append(label);
    });
    if (states.length < controls.reduce((product, { steps }) => product * steps.length, 1)) {
      box.append(make("p", { textContent: "One control moves at a time; the others go back to their first value." }));
    }
    show(states[0]);
    figure.querySelector(".explorer-state").replaceWith(box, said);
    addEventListener("hashchange", follow);
    follow();
  }

  const start = () =>
    document.querySelectorAll("figure.explorer").forEach((figure, i) => begin(figure, i + 1).catch(console.warn));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}
