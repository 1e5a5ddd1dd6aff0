/* The search in pages that are opened as files.

   The theme searches in a web worker, and browsers start none from a file. Here an iframe takes the worker's place: the
   same script, in a document of its own. mkdocs.yml names this file in place of the shim that the theme's plugin
   "offline" takes from a CDN; the theme looks for the name IFrameWorker. */
"use strict";
if (location.protocol === "file:") {
  self.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      const script = document.createElement("script");
      script.src = new URL(url, document.baseURI).href;
      frame.hidden = true;
      frame.srcdoc = `<script>postMessage = (data) => parent.postMessage(data, "*")</script>${script.outerHTML}`;
      this.frame = new Promise((loaded) => { frame.onload = () => loaded(frame); });
      addEventListener("message", ({ source, data }) => {
        if (source === frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      document.body.append(frame);
    }

    async postMessage(data) {
      (await this.frame).contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
  self.Worker = self.IFrameWorker;
}
