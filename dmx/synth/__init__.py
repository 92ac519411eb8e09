"""Renders labelled people: every image is a pure function of (seed, style, identity, camera, index).

`dmx.synth.render` has `render` and `Renderer`, `dmx.synth.dataset` has `write_dataset`, `dmx.synth.sheet` has
`contact_sheet`, and `dmx.synth.styles` the styles. Nothing is imported here, so that `dmx --help` is quick.
"""
