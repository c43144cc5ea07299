from .program import export_model as export_model
