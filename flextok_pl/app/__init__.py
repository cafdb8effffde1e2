"""What `flextok app` shows: `work` computes, `page` lays it out with Gradio."""
