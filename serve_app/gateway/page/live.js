// Asking again and again, as seldom as will do: a hidden page asks nothing, and one that nobody
// has touched for a while asks slowly. A thousand forgotten tabs then cost the gateway little.

const RESTING_AFTER_S = 120;
const RESTING_S = 20;

let touched = performance.now();
for (const event of ["pointermove", "pointerdown", "keydown", "scroll"]) {
  addEventListener(event, () => (touched = performance.now()), { passive: true, capture: true });
}

/** Call `ask` now and then every `seconds()`, or later where it answers with a longer pause, while
 *  `wanted()`. Returns a function that asks at once, or with `true` again where one is on its way. */
export function poll(ask, seconds, wanted) {
  let timer = 0;
  let running = false;
  let again = false;
  async function turn(anew = false) {
    again = running && (again || anew);
    if (running) return;
    clearTimeout(timer);
    running = true;
    let next = 0;
    try {
      if (wanted() && !document.hidden) next = (await ask()) || 0;
    } finally {
      running = false;
      const resting = performance.now() - touched > RESTING_AFTER_S * 1000;
      next = again ? 0 : Math.max(next || 0, seconds(), resting ? RESTING_S : 0);
      timer = setTimeout(turn, next * 1000);
    }
  }
  document.addEventListener("visibilitychange", () => document.hidden || turn());
  turn();
  return turn;
}

/** The seconds after which the gateway wants to be asked again: it grows with those who look. */
export function pause(response) {
  return Number(response.headers.get("x-poll-s"));
}
