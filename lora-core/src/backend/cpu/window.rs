//! Convolutions as products: the input unfolded into one column for every position of the window.

use crate::ConvGeometry;

/// How a convolution's window meets one picture.
pub(super) struct Window {
    geometry: ConvGeometry,
    input: [usize; 2],
    kernel: [usize; 2],
    /// Positions of the window, `[h', w']`.
    pub(super) output: [usize; 2],
}

impl Window {
    /// `None` if the window does not fit into the padded input even once.
    pub(super) fn new(geometry: ConvGeometry, input: [usize; 2], kernel: [usize; 2]) -> Option<Self> {
        let mut output = [0; 2];
        for axis in 0..2 {
            let reach = geometry.dilation[axis].checked_mul(kernel[axis].checked_sub(1)?)?.checked_add(1)?;
            let room = geometry.padding[axis].checked_mul(2)?.checked_add(input[axis])?.checked_sub(reach)?;
            output[axis] = room.checked_div(geometry.stride[axis])? + 1;
        }
        Some(Self { geometry, input, kernel, output })
    }

    /// Every window of `picture` `[channels, h, w]` as one column of `unfolded` `[channels·kh·kw, h'·w']`.
    pub(super) fn unfold(&self, picture: &[f32], channels: usize, unfolded: &mut [f32]) {
        let ConvGeometry { stride, padding, dilation } = self.geometry;
        let ([height, width], [kh, kw], [oh, ow]) = (self.input, self.kernel, self.output);
        let mut at = 0;
        for channel in 0..channels {
            for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
                for y in 0..oh {
                    let row = (y * stride[0] + ky * dilation[0]).checked_sub(padding[0]).filter(|row| *row < height);
                    for x in 0..ow {
                        let column =
                            (x * stride[1] + kx * dilation[1]).checked_sub(padding[1]).filter(|column| *column < width);
                        unfolded[at] = match (row, column) {
                            (Some(row), Some(column)) => picture[(channel * height + row) * width + column],
                            _ => 0.0,
                        };
                        at += 1;
                    }
                }
            }
        }
    }
}
