"""How the page looks: the system's own fonts, nothing from elsewhere, light and dark."""

from __future__ import annotations

from typing import Any

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> Any:
    """The page's theme: Gradio's plain one in a quiet blue, with fonts that every system has."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO,
        radius_size=gr.themes.sizes.radius_lg,
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        block_border_width="1px", block_shadow="none", block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200", block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200", block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300", body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300", button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700", button_primary_text_color="white",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )


CSS = """
.gradio-container { --ds-ink: #1b2430; --ds-faint: #556170; --ds-line: #d8dee6; --ds-soft: #f1f5f9; --ds-paper: #fff;
  --ds-accent: #1d4ed8; --ds-warn: #9a3412; --heat: #1d5fc4; --ink: var(--ds-ink); --faint: var(--ds-faint); }
.dark .gradio-container, .gradio-container.dark, .dark { --ds-ink: #e7ecf2; --ds-faint: #a9b4c2; --ds-line: #334155;
  --ds-soft: #1a2334; --ds-paper: #111a2b; --ds-accent: #93b8ff; --ds-warn: #fdba74; --heat: #5ea0ff; }
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.ds { color: var(--ds-ink); font-size: 15px; line-height: 1.5; }
.ds .faint { color: var(--ds-faint); font-size: 13px; margin: 6px 0; }
.ds h3 { font-size: 15px; font-weight: 600; margin: 18px 0 8px; color: var(--ds-ink); }
.ds-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 16px; padding: 6px 2px 2px; }
.ds-head h1 { font-size: 24px; font-weight: 650; margin: 0; letter-spacing: -.01em; color: var(--ds-ink); }
.ds-head p { margin: 0; color: var(--ds-faint); flex: 1 1 320px; }
.ds-chip { border: 1px solid var(--ds-line); border-radius: 999px; padding: 2px 12px; font-size: 13px;
  color: var(--ds-ink); background: var(--ds-paper); white-space: nowrap; }
.ds-card { border: 1px solid var(--ds-line); border-radius: 12px; background: var(--ds-paper); padding: 14px 16px; }
.ds-empty { color: var(--ds-faint); padding: 36px 16px; text-align: center; border-style: dashed; }
.ds-bad { border-color: var(--ds-warn); color: var(--ds-warn); font-weight: 600; }
.ds-row { display: flex; justify-content: space-between; flex-wrap: wrap; gap: 4px 16px; }
.ds-bar { height: 8px; border-radius: 8px; background: var(--ds-soft); overflow: hidden; margin: 10px 0; }
.ds-bar > div { height: 100%; border-radius: 8px; background: var(--ds-accent); transition: width .3s; }
.ds-strip { width: 100%; border-radius: 8px; display: block; margin-top: 10px; image-rendering: pixelated; }
.ds-clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
.ds-clips video, .ds-clips img { width: 100%; display: block; border-radius: 10px; background: #0d1322; }
.ds-tools { display: flex; flex-wrap: wrap; align-items: center; gap: 10px 14px; margin: 12px 0 4px; }
.ds-tools input[type=range] { flex: 1 1 160px; accent-color: var(--ds-accent); min-width: 120px; }
.ds-tools button, .ds-tools a { border: 1px solid var(--ds-line); border-radius: 8px; padding: 5px 14px;
  background: var(--ds-soft); color: var(--ds-ink); font-size: 14px; text-decoration: none; cursor: pointer; }
.ds-tools button:hover, .ds-tools a:hover { border-color: var(--ds-accent); }
.ds :focus-visible, .gradio-container button:focus-visible { outline: 3px solid var(--ds-accent); outline-offset: 2px; }
.ds-numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(100px, 1fr)); gap: 10px; margin: 14px 0; }
.ds-numbers div { border: 1px solid var(--ds-line); border-radius: 10px; padding: 8px 12px;
  background: var(--ds-soft); }
.ds-numbers dt { font-size: 12.5px; color: var(--ds-faint); }
.ds-numbers dd { margin: 0; font-size: 18px; white-space: nowrap;
  font-weight: 600; font-variant-numeric: tabular-nums; }
.ds-scroll { overflow-x: auto; } .ds svg { max-width: 100%; height: auto; display: block; }
.ds svg text { fill: var(--ds-ink); font: 12px system-ui, sans-serif; }
.ds svg text.faint { fill: var(--ds-faint); } .ds svg .heat { fill: var(--heat); } .ds svg text.onheat { fill: #fff; }
.dark .ds svg text.onheat { fill: #0b1220; }
.ds table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
.ds th, .ds td { text-align: left; padding: 6px 12px 6px 0 !important; border: 0 !important;
  border-bottom: 1px solid var(--ds-line) !important; }
.ds table, .ds tr { border: 0 !important; }
.ds th { color: var(--ds-faint); font-weight: 600; }
.ds-maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 16px; }
.ds figure { margin: 0 0 10px; } .ds figcaption { font-size: 13px; color: var(--ds-faint); margin: 6px 2px; }
.ds figcaption b { color: var(--ds-ink); }
.ds-maps img { width: 100%; border-radius: 8px; display: block; }
.ds-maps .ds-blocks { image-rendering: pixelated; width: 38%; margin-top: 8px; border: 1px solid var(--ds-line); }
.ds-pick img { width: 100%; border-radius: 8px; display: block; cursor: crosshair; } .ds-pick h3 { margin-top: 0; }
.gradio-container .html-container { padding: 0 !important; }
.ds pre { white-space: pre-wrap; overflow-wrap: anywhere; } .ds summary { cursor: pointer; margin: 12px 0; }
.ds h3.ds-missed { color: var(--ds-warn); }
.ds-key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px 0 12px; }
@media (max-width: 640px) { .ds-head h1 { font-size: 20px; }
  .tab-container button { padding: 0 9px !important; } }
@media (prefers-reduced-motion: reduce) { .ds-bar > div { transition: none; } }
"""
