// Without this script all steps stand one below the other. It shows one, and a slider.
(() => {
  const steps = [...document.querySelectorAll(".step")];
  const find = (id) => document.getElementById(id);
  const [slider, play, place] = [find("slider"), find("play"), find("place")];
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let current = 0;
  let timer = 0;

  function show(number) {
    current = Math.min(Math.max(number, 0), steps.length - 1);
    steps.forEach((step, n) => { step.hidden = n !== current; });
    const [name, timestep] = steps[current].querySelector("h3").childNodes;
    slider.value = current;
    slider.setAttribute("aria-valuetext", `${name.textContent}, ${timestep.textContent}`);
    place.value = name.textContent.replace("Step ", "");
    find("back").disabled = current === 0;
    find("next").disabled = current === steps.length - 1;
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }

  function start() {
    if (current === steps.length - 1) show(0);
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      show(current + 1);
      if (current === steps.length - 1) stop();
    }, calm.matches ? 1500 : 250);
  }

  function showLinked(behavior) {
    const linked = steps.findIndex((step) => `#${step.id}` === location.hash);
    if (linked < 0) return;
    stop();
    show(linked);
    find("panels").scrollIntoView({ behavior });
  }

  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => (timer ? stop() : start()));
  find("back").addEventListener("click", () => { stop(); show(current - 1); });
  find("next").addEventListener("click", () => { stop(); show(current + 1); });
  addEventListener("hashchange", () => showLinked("auto"));
  document.addEventListener("click", (event) => {  // also where the address is that already
    const link = event.target.closest('a[href^="#step-"]');
    if (link && link.getAttribute("href") === location.hash) showLinked("auto");
  });

  document.documentElement.classList.add("js");
  find("controls").hidden = false;
  show(0);
  showLinked("instant");

  const links = [...document.querySelectorAll("nav a")];
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      for (const link of links) {
        if (link.hash === `#${target.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  document.querySelectorAll("main > section").forEach((section) => seen.observe(section));
})();
