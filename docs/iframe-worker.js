// The search of a page that is opened from disk. Browsers give such a page no workers; a hidden frame does their work.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><title>search</title>";
      this.window = new Promise((ready) => {
        frame.onload = () => {
          const inside = frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const element = inside.document.createElement("script");
          element.src = new URL(script, location.href);
          element.onload = () => ready(inside);
          inside.document.head.append(element);
        };
      });
      document.body.append(frame);
    }

    async postMessage(data) {
      const inside = await this.window;
      inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
