// Words for readers who do not see: JupyterLab draws a picture without the alternative text that its output holds, and
// ipywidgets makes a slider whose handle has no name. No build: this file is a container as module federation has it.

(window._JUPYTERLAB ??= {})["kv-cache-labs"] = (() => {
  let shared; // name -> version -> {get}: what JupyterLab shares with its extensions

  async function load(name) {
    const [newest] = Object.values(shared[name]);
    return (await newest.get())();
  }

  // The renderer that is there, and after it the text from the output's metadata: {"image/png": {"alt": ...}}.
  function tellPictures(rendermime) {
    const type = "image/png";
    const drawn = rendermime.getFactory(type);
    rendermime.addFactory({
      ...drawn,
      mimeTypes: [type],
      createRenderer: options => {
        const renderer = drawn.createRenderer(options);
        const render = renderer.renderModel.bind(renderer);
        renderer.renderModel = async model => {
          await render(model);
          const alt = model.metadata[type]?.alt;
          if (typeof alt === "string") {
            renderer.node.querySelectorAll("img").forEach(img => (img.alt = alt));
          }
        };
        return renderer;
      },
    });
  }

  // A slider is called what its label says, and stands at what is written beside it.
  function nameSliders() {
    for (const handle of document.querySelectorAll(".jupyter-widgets .noUi-handle")) {
      const slider = handle.closest(".widget-inline-hbox");
      for (const [attribute, place] of [["aria-label", ".widget-label"], ["aria-valuetext", ".widget-readout"]]) {
        const text = slider?.querySelector(place)?.textContent;
        if (text && handle.getAttribute(attribute) !== text) {
          handle.setAttribute(attribute, text);
        }
      }
    }
  }

  function watchSliders() {
    let waiting = false;
    const later = () => {
      waiting ||= (requestAnimationFrame(() => ((waiting = false), nameSliders())), true);
    };
    new MutationObserver(later).observe(document.body, { childList: true, characterData: true, subtree: true });
  }

  // On a narrow page a picture keeps its size and is moved to and fro: shrunk, its labels could not be read.
  function keepPicturesLegible() {
    const style = document.createElement("style");
    style.textContent = `@media (max-width: 760px) {
      .jp-OutputArea-output img { max-width: none !important; }
      .jp-OutputArea-output { overflow-x: auto !important; }
    }`;
    document.head.append(style);
  }

  return {
    init: scope => {
      shared = scope;
    },
    get: async () => {
      const { IRenderMimeRegistry } = await load("@jupyterlab/rendermime");
      const plugin = {
        id: "kv-cache-labs:words",
        description: "Alternative text of pictures, names of sliders, pictures on narrow pages.",
        autoStart: true,
        requires: [IRenderMimeRegistry],
        activate: (app, rendermime) => {
          tellPictures(rendermime);
          watchSliders();
          keepPicturesLegible();
        },
      };
      return () => ({ __esModule: true, default: plugin });
    },
  };
})();
