"""A web page to caption images and see where the model looks, made with Gradio."""
