"""The live page of a run: Bokeh figures and HTML tables, fed by one small message a second. See `dashboard.app`."""
