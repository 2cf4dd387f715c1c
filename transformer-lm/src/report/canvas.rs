//! What charts are drawn on: a vector picture and a raster picture.

use std::fmt::Write;

use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};
use tiny_skia::{Color, Paint, PathBuilder, Pixmap, PremultipliedColorU8, Stroke, StrokeDash, Transform};

/// Red, green and blue.
pub(super) type Colour = [u8; 3];

/// Which point of a text is placed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a line looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pen {
    pub colour: Colour,
    pub width: f32,
    pub dashed: bool,
}

/// A picture whose origin is at the top left, in pixels.
pub(super) trait Canvas {
    /// A line through points.
    fn line(&mut self, points: &[(f32, f32)], pen: Pen);

    /// A text with its base line at `at`.
    fn text(&mut self, at: (f32, f32), anchor: Anchor, text: &str);
}

/// SVG as text.
pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new(width: u32, height: u32) -> Svg {
        Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n"
        ))
    }

    pub(super) fn finish(self) -> String {
        self.0 + "</svg>\n"
    }
}

impl Canvas for Svg {
    fn line(&mut self, points: &[(f32, f32)], pen: Pen) {
        let [r, g, b] = pen.colour;
        let dash = if pen.dashed { " stroke-dasharray=\"5 3\"" } else { "" };
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            self.0,
            "<polyline fill=\"none\" stroke=\"#{r:02x}{g:02x}{b:02x}\" stroke-width=\"{}\"{dash} points=\"{}\"/>",
            pen.width,
            points.join(" ")
        );
    }

    fn text(&mut self, at: (f32, f32), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escaped(text);
        let _ = writeln!(self.0, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{text}</text>", at.0, at.1);
    }
}

/// Text as it has to be written between tags and in attributes.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Pixels, black on white.
pub(super) struct Png(Pixmap);

impl Png {
    /// None where the picture would be too large.
    pub(super) fn new(width: u32, height: u32) -> Option<Png> {
        let mut pixmap = Pixmap::new(width, height)?;
        pixmap.fill(Color::WHITE);
        Some(Png(pixmap))
    }

    /// The bytes of a PNG file.
    pub(super) fn finish(self) -> Result<Vec<u8>, String> {
        self.0.encode_png().map_err(|error| error.to_string())
    }

    fn glyph(&mut self, character: char, left: f32, base: f32) {
        const HEIGHT: RasterHeight = RasterHeight::Size16;
        let style = FontWeight::Regular;
        let Some(glyph) = get_raster(character, style, HEIGHT).or_else(|| get_raster('?', style, HEIGHT)) else {
            return;
        };
        let (left, top) = (left.round() as i64, base.round() as i64 - 13); // the base line is 13 of 16 pixels down
        let (width, height) = (i64::from(self.0.width()), i64::from(self.0.height()));
        for (y, row) in (top..).zip(glyph.rows()) {
            for (x, ink) in (left..).zip(row) {
                if *ink > 0 && (0..width).contains(&x) && (0..height).contains(&y) {
                    let grey = 255 - ink;
                    let pixel = PremultipliedColorU8::from_rgba(grey, grey, grey, 255);
                    self.0.pixels_mut()[(y * width + x) as usize] = pixel.unwrap_or(PremultipliedColorU8::TRANSPARENT);
                }
            }
        }
    }
}

impl Canvas for Png {
    fn line(&mut self, points: &[(f32, f32)], pen: Pen) {
        let mut path = PathBuilder::new();
        for (index, (x, y)) in points.iter().enumerate() {
            if index == 0 { path.move_to(*x, *y) } else { path.line_to(*x, *y) }
        }
        let Some(path) = path.finish() else { return };
        let [r, g, b] = pen.colour;
        let mut paint = Paint::default();
        paint.set_color_rgba8(r, g, b, 255);
        let dash = if pen.dashed { StrokeDash::new(vec![5.0, 3.0], 0.0) } else { None };
        let stroke = Stroke { width: pen.width, dash, ..Stroke::default() };
        self.0.stroke_path(&path, &paint, &stroke, Transform::identity(), None);
    }

    fn text(&mut self, at: (f32, f32), anchor: Anchor, text: &str) {
        let advance = get_raster_width(FontWeight::Regular, RasterHeight::Size16) as f32;
        let width = advance * text.chars().count() as f32;
        let left = match anchor {
            Anchor::Start => at.0,
            Anchor::Middle => at.0 - width / 2.0,
            Anchor::End => at.0 - width,
        };
        for (index, character) in text.chars().enumerate() {
            self.glyph(character, left + advance * index as f32, at.1);
        }
    }
}
