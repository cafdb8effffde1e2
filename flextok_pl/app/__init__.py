"""The page of `flextok app`: `work` computes, `page` lays it out with Gradio."""
